"""The functions of the commands, a file each, by the name that they had before."""

from adamerge_jax.pipeline.ended_run import Run, ended_run
from adamerge_jax.pipeline.export_and_compare import export_and_compare
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.run_coarsen import coarsen_file
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.pipeline.run_learn import UNWATCHED, learn
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.pipeline.run_mergekit import write_mergekit

__all__ = [
    "UNWATCHED",
    "Run",
    "coarsen_file",
    "ended_run",
    "evaluate",
    "export_and_compare",
    "export_job",
    "fold_file",
    "learn",
    "merge",
    "write_mergekit",
]
