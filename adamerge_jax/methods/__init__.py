"""Merges with nothing to learn: one file a method.

A method is used by itself (`adamerge merge`) and as a row of the table of results. To add one,
write a file with a function of options that returns a `MergeMethod`, and add its line to `METHODS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from adamerge_jax.methods.average import average
from adamerge_jax.methods.breadcrumbs import breadcrumbs
from adamerge_jax.methods.consensus import consensus
from adamerge_jax.methods.dare import dare
from adamerge_jax.methods.lines import lines
from adamerge_jax.methods.method import MergeMethod, merged_parameters
from adamerge_jax.methods.pcb import pcb
from adamerge_jax.methods.sce import sce
from adamerge_jax.methods.task_arithmetic import task_arithmetic
from adamerge_jax.methods.ties import ties
from adamerge_jax.registry import call_registered

__all__ = [
    "METHODS",
    "MergeMethod",
    "average",
    "breadcrumbs",
    "consensus",
    "dare",
    "lines",
    "make_method",
    "merged_parameters",
    "pcb",
    "sce",
    "task_arithmetic",
    "ties",
]

METHODS: dict[str, Callable[..., MergeMethod]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "breadcrumbs": breadcrumbs,
    "pcb": pcb,
    "consensus": consensus,
    "lines": lines,
    "sce": sce,
}
"""The merge methods by their names on the command line."""


def make_method(name: str, options: Mapping[str, Any]) -> MergeMethod:
    """Makes a merge method by name.

    Args:
        name: A key of `METHODS`, or `package.module:function`.
        options: Arguments of the function.

    Raises:
        InputError: There is no such method, or it refuses an option.
    """
    return call_registered("method", METHODS, name, options, returns=MergeMethod)
