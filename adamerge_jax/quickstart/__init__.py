"""The example that comes with the package: four experts of handwritten digits, made and merged."""

from adamerge_jax.quickstart.experts import prepare, recipe_text
from adamerge_jax.quickstart.tasks import TASKS

__all__ = ["TASKS", "prepare", "recipe_text"]
