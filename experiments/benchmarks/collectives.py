"""Communication of a learning step: `python experiments/benchmarks/collectives.py`.

The step of `experts.py` on virtual devices of the CPU. The compiled program is read, and nothing is
run: the bytes of each kind of communication, those in a loop times its rounds, for three layouts of
the devices, each with twice the examples and with twice the experts too.
"""

import argparse
import json
import re
from math import prod
from typing import NamedTuple

from rich.table import Table

from adamerge_jax.cli.console import make_console

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""The kinds of communication in a compiled program."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_BYTES |= {"s64": 8, "u64": 8}


class Collective(NamedTuple):
    """An array that devices communicate in a compiled program.

    Attributes:
        kind: One of `KINDS`.
        bytes: The size of the whole array, gathered or before it is scattered.
        rounds: How often: more than once in a loop, such as that over layers.
    """

    kind: str
    bytes: int
    rounds: int


def collectives(text: str) -> list[Collective]:
    """Returns the communication in a compiled program, from its text (`compiled.as_text()`)."""
    inside, loops, operations = "", {}, []
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = opened[1]
        if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            loops[body[1]] = (inside, int(rounds[1]) if rounds else 1)
        if operation := re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
            operations.append((inside, operation[2], operation[1], line))

    def rounds_of(computation: str) -> int:
        outer, rounds = loops.get(computation, (None, 1))
        return rounds if outer is None else rounds * rounds_of(outer)

    return [
        Collective(kind, _bytes_of(dtype, sizes) * parts, rounds_of(computation))
        for computation, kind, shapes, line in operations
        for parts in [_group_size(line) if kind == "reduce-scatter" else 1]
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]


def _bytes_of(dtype: str, sizes: str) -> int:
    return _BYTES[dtype] * prod(int(size) for size in sizes.split(",") if size)


def _group_size(line: str) -> int:
    """Returns the number of devices that communicate with each other."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(groups[1].split(","))
    return int(re.search(r"replica_groups=\[\d+,(\d+)\]", line)[1])


def measure(experts: int, size: int, model: int) -> dict[str, int]:
    """Returns the bytes of a step by kind, and those of the weights and of what is learned."""
    import experts as benchmark
    import jax
    import numpy as np

    from adamerge_jax.devices import open_devices

    learner, *arguments = benchmark.learning_step(experts, size, open_devices(model))
    program = collectives(learner.step.lower(*arguments).compile().as_text())
    sums = {kind: sum(c.bytes * c.rounds for c in program if c.kind == kind) for kind in KINDS}
    state, frozen, _ = arguments
    for name, tree in {"weights": frozen.base, "learned": (state.raw, state.heads)}.items():
        sums[name] = sum(4 * np.size(leaf) for leaf in jax.tree.leaves(tree))
    return sums


def main() -> None:
    """Starts a process for every program, and prints the table."""
    from processes import in_own_process

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--measure", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(*arguments.measure)))
        return
    count = arguments.devices
    table = Table(title=f"communication of a step on {count} devices (MB)")
    for column in ("data x model", "experts", "images of each", "weights", "learned", *KINDS):
        table.add_column(column, justify="right")
    for model in (1, count // 2, count):
        for experts, size in ((4, count), (4, 2 * count), (8, count)):
            sums = in_own_process(__file__, "--measure", experts, size, model, devices=count)
            figures = (f"{sums[name] / 1e6:.3f}" for name in ("weights", "learned", *KINDS))
            table.add_row(f"{count // model} x {model}", str(experts), str(size), *figures)
    make_console().print(table)


if __name__ == "__main__":
    main()
