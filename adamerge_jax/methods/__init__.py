"""Merges with nothing to learn: one file a method.

A method is used by itself (`adamerge merge`) and as a row of the table of results. To add one,
write a file with a function of options that returns a `MergeMethod`, and add its line to `METHODS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from adamerge_jax.methods.ace import ace
from adamerge_jax.methods.average import average
from adamerge_jax.methods.breadcrumbs import breadcrumbs
from adamerge_jax.methods.consensus import consensus
from adamerge_jax.methods.dare import dare
from adamerge_jax.methods.featcal import featcal
from adamerge_jax.methods.fisher import fisher
from adamerge_jax.methods.iso_c import iso_c
from adamerge_jax.methods.iso_cts import iso_cts
from adamerge_jax.methods.knots import knots
from adamerge_jax.methods.lines import lines
from adamerge_jax.methods.lora_lego import lora_lego
from adamerge_jax.methods.method import MergeMethod, merged_parameters
from adamerge_jax.methods.metrics_weighted import metrics_weighted
from adamerge_jax.methods.opcm import opcm
from adamerge_jax.methods.pcb import pcb
from adamerge_jax.methods.regmean import regmean
from adamerge_jax.methods.regmean_plus_plus import regmean_plus_plus
from adamerge_jax.methods.sce import sce
from adamerge_jax.methods.task_arithmetic import task_arithmetic
from adamerge_jax.methods.ties import ties
from adamerge_jax.methods.tsv_m import tsv_m
from adamerge_jax.methods.wudi import wudi
from adamerge_jax.registry import call_registered

__all__ = [
    "METHODS",
    "MergeMethod",
    "ace",
    "average",
    "breadcrumbs",
    "consensus",
    "dare",
    "featcal",
    "fisher",
    "iso_c",
    "iso_cts",
    "knots",
    "lines",
    "lora_lego",
    "make_method",
    "merged_parameters",
    "metrics_weighted",
    "opcm",
    "pcb",
    "regmean",
    "regmean_plus_plus",
    "sce",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]

METHODS: dict[str, Callable[..., MergeMethod]] = {
    "average": average,
    "featcal": featcal,
    "fisher": fisher,
    "metrics_weighted": metrics_weighted,
    "regmean": regmean,
    "regmean_plus_plus": regmean_plus_plus,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "breadcrumbs": breadcrumbs,
    "pcb": pcb,
    "consensus": consensus,
    "lines": lines,
    "sce": sce,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "ace": ace,
    "wudi": wudi,
    "knots": knots,
    "lora_lego": lora_lego,
    "opcm": opcm,
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
