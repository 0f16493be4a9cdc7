"""The statistics of calibration data that merge methods ask for."""

from adamerge_jax.statistics.features import Moments, NormMoments
from adamerge_jax.statistics.grams import CalibrationBatch
from adamerge_jax.statistics.linear import Layer
from adamerge_jax.statistics.statistics import Statistics, TaskData

__all__ = ["CalibrationBatch", "Layer", "Moments", "NormMoments", "Statistics", "TaskData"]
