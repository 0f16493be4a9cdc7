"""The plan of a step of 8 x 7B beside XLA's: `python experiments/benchmarks/plan_memory.py`.

The recipe of `plan.py --headers` is changed as `plan` advises for a device, and its learning step
is compiled for the processor. There are shapes alone: no weight is made, nothing runs. Layers are
scanned, so the program is one layer's, 32 times.

XLA's CPU backend computes in float32 and knows no 4 bits, and its pass
`while-loop-invariant-code-motion` converts all layers before the loop over them, for which an
accelerator that reads bfloat16 has less reason: the plan is compared with a program compiled
without that pass, and the figure with it is shown. Activations in bfloat16 are
partly in float32 on a processor; with `dtype: float32` both are alike.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from plan import write_recipe_of_headers
from rich.table import Table

from adamerge_jax import load_recipe
from adamerge_jax.cli.console import make_console
from adamerge_jax.plan import make_plan
from adamerge_jax.plan.memory import programs_of
from adamerge_jax.plan.outline import Outline, outline
from adamerge_jax.plan.work import bytes_of

WITHOUT_HOISTING = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def analysed(step: Any, options: dict[str, str] | None) -> tuple[int, int]:
    """Returns the bytes of a compiled step's arguments, and those beside them."""
    analysis = step.compile(options).memory_analysis()
    beside = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return analysis.argument_size_in_bytes, beside - analysis.alias_size_in_bytes


def compare(merge: Outline) -> list[float]:
    """Returns GB: arguments and the rest by the plan, by XLA, and the rest where XLA hoists."""
    learning, batch = merge.learning(), merge.batch(merge.longest)
    programs = programs_of(merge, learning, compiled=False, is_cpu=False, names=("step",))
    arguments = learning.state, learning.frozen, batch
    step = learning.learner.step.lower(*arguments)
    by_xla, hoisted = analysed(step, WITHOUT_HOISTING), analysed(step, None)
    by_plan = sum(map(bytes_of, arguments)), programs.step.kept_bytes
    return [size / 1e9 for size in (*by_plan, *by_xla, hoisted[1])]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h100")
    arguments = parser.parse_args()
    console, table = make_console(), Table(title="A learning step (GB)")
    table.add_column("dtype")
    columns = ("plan: arguments", "beside", "sum", "XLA: arguments", "beside", "sum", "plan / XLA")
    for column in (*columns, "XLA, hoisting: beside"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = load_recipe(write_recipe_of_headers(folder))
        merge = outline(recipe, folder)
        for change in make_plan(recipe, folder, arguments.device).changes:
            console.print(f"{change.field}: {change.value}")
            merge = merge.changed(change.field, change.value)
        for dtype in ("bfloat16", "float32"):
            planned, kept, given, used, hoisted = compare(merge.changed("dtype", dtype))
            sums = planned + kept, given + used
            values = (planned, kept, sums[0], given, used, sums[1], sums[0] / sums[1], hoisted)
            table.add_row(dtype, *(f"{value:.2f}" for value in values))
    console.print(table)


if __name__ == "__main__":
    main()
