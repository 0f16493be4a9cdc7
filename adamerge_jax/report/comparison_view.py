"""What people look at of a comparison: tables, and a map of the differences."""

import numpy as np
from rich.console import Console
from rich.table import Table

from adamerge_jax.report.comparison import Comparison

_LAYERS = 10
"""So many of the layers that changed most are shown."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints what differs, how much for each expert, and in which layers most."""
    if comparison.fields:
        table = Table(title="What differs")
        for column in ("", "first", "second"):
            table.add_column(column, overflow="fold")
        for row in comparison.fields:
            table.add_row(*row)
        console.print(table)
    groups = "tensors" if comparison.by_tensor else "groups of tensors"
    only_first, only_second = comparison.unmatched
    console.print(
        f"compared: {comparison.compared} {groups}"
        f"{' by their means, as granularities differ' if comparison.per_tensor else ''}"
        f"{f', {only_first} only in the first' if only_first else ''}"
        f"{f', {only_second} only in the second' if only_second else ''}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="Coefficients, second less first")
    table.add_column("expert", no_wrap=True)
    for column in ("mean before", "after", "mean change", "largest", "correlation"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("largest in", overflow="fold")
    for own in comparison.experts:
        correlation = "" if np.isnan(own.correlation) else f"{own.correlation:.3f}"
        table.add_row(
            own.name,
            f"{own.first:.3f}",
            f"{own.second:.3f}",
            f"{own.change:.3f}",
            f"{own.largest:+.3f}",
            correlation,
            own.where,
        )
    console.print(table)
    table = Table(title="Layers that changed most (mean change)")
    table.add_column("layer", overflow="fold")
    for own in comparison.experts:
        table.add_column(own.name, justify="right", no_wrap=True)
    for layer, changes in comparison.layers[:_LAYERS]:
        table.add_row(layer, *(f"{change:.3f}" for change in changes))
    console.print(table)
