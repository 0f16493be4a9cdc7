"""Time of a learning step over the number of devices: `python experiments/benchmarks/scaling.py`.

The step and the sizes are those of `step.py`; each number of devices in a process of its own. On an
accelerator it takes the first 1, 2, 4, ... of those that there are. On a CPU the devices are
virtual: they share its cores, so that the figures say what splitting costs, not what it gains.
"""

import argparse
import json
import sys

from processes import in_own_process
from rich.table import Table

from adamerge_jax.cli.console import make_console


def measure(size: str, count: int, model: int, repeats: int) -> dict[str, object] | None:
    """Seconds and peak bytes of a step on so many devices; None where there are fewer."""
    # Imported here: a process that only starts the others must not take the accelerator.
    import jax
    import numpy as np
    import step
    import timing
    from jax.sharding import Mesh

    from adamerge_jax.devices import DATA, MODEL, ONE_DEVICE, Devices

    found = jax.devices()
    if len(found) < count:
        return None
    devices = ONE_DEVICE
    if count > 1:
        devices = Devices(Mesh(np.array(found[:count]).reshape(-1, model), (DATA, MODEL)))
    result = timing.measure(step.learning_step(size, "elementwise", devices), repeats)
    virtual = "virtual, " if found[0].platform == "cpu" else ""
    return result | {"device": f"{virtual}{found[0].device_kind}"}


def main() -> None:
    """Starts a process for every number of devices, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "large"), default="small")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--model", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is not None:
        (count,) = arguments.devices
        print(json.dumps(measure(arguments.size, count, arguments.model, arguments.repeats)))
        return
    rows, first = [], None
    meshes = [(count, model) for count in arguments.devices for model in sorted({1, count})]
    for count, model in meshes:
        options = ("--size", arguments.size, "--devices", count, "--model", model)
        options += ("--repeats", arguments.repeats)
        result = in_own_process(__file__, *options, devices=count)
        if result is None:
            continue
        first = first or result
        rows.append(
            (
                str(count),
                f"{count // model} x {model}",
                f"{1000 * result['seconds']:.1f}",
                f"{first['seconds'] / result['seconds']:.2f}",
                f"{result['peak'] / 1e9:.2f}",
            )
        )
    if first is None:
        sys.exit("there are fewer devices than that")
    table = Table(title=f"learning step, {arguments.size}; on {first['device']}")
    for column in ("devices", "data x model", "ms/step", "times as fast", "peak GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


if __name__ == "__main__":
    main()
