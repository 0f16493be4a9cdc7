"""What the benchmarks of steps share: each variant in a process of its own, one table per size."""

import argparse
import json
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from processes import in_own_process
from rich.live import Live
from rich.table import Table

from adamerge_jax.cli.console import make_console
from adamerge_jax.runs.record import peak_memory_of_arrays

MakeStep = Callable[[str], Callable[[], object]]
"""From a size to a function that runs one step and waits for it."""


def run(
    description: str, file: str, variants: Mapping[str, MakeStep], titles: Mapping[str, str]
) -> None:
    """Measures every variant and prints a table for each size, against the first variant.

    Args:
        description: Of the command.
        file: The benchmark, which is started anew for each variant, so that a peak is its own.
        variants: What is measured.
        titles: Of the tables, by size.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(titles), help="one size only")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--variant", choices=list(variants), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        step = variants[arguments.variant](arguments.size)
        print(json.dumps(measure(step, arguments.repeats)))
        return
    for size in [arguments.size] if arguments.size else titles:
        table = Table(title=f"{titles[size]}; on {jax.devices()[0].device_kind}")
        for column in ("", "ms/step", "times a", "CPU ms/step", "times a", "peak GB", "times a"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        first = None
        with Live(table, console=make_console(), refresh_per_second=1):
            for variant in variants:
                options = ("--variant", variant, "--size", size, "--repeats", arguments.repeats)
                result = in_own_process(file, *options)
                first = first or result
                cells = []
                for name, unit in (("seconds", 1e-3), ("processor_seconds", 1e-3), ("peak", 1e9)):
                    cells.append(f"{result[name] / unit:.{2 if name == 'peak' else 1}f}")
                    cells.append(f"{result[name] / first[name]:.2f}")
                table.add_row(variant, *cells)


def measure(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of a step after a first one, and the peak memory in bytes.

    Processor seconds are of this process alone: others beside it do not change them much. The peak
    is the device's, or this process's where the device is the CPU.
    """
    step()
    seconds, processor_seconds = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - used)
    return {
        "seconds": float(np.median(seconds)),
        "processor_seconds": float(np.median(processor_seconds)),
        "peak": peak_memory_of_arrays(),
    }
