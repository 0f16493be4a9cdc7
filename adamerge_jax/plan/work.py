"""The work of a program from its trace: operations, bytes moved, bytes kept.

The trace of a compiled function has every operation with its shapes. Matrix products give the
floating-point operations; operations that a compiler cannot fuse give the bytes. The trace does not
depend on a device, so the estimate is for any device, present or not.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend import core

from adamerge_jax.checkpoints.dtypes import INT4

_UNFUSED = {
    "dot_general",
    "conv_general_dilated",
    "scan",
    "while",
    "cond",
    "sort",
    "top_k",
    "gather",
    "scatter",
    "scatter-add",
    "dynamic_update_slice",
    "concatenate",
    "cumsum",
    "custom_call",
    "reduce_sum",
    "reduce_max",
    "argmax",
}
"""Operations whose results exist in memory; all others are fused into those that use them."""

BESIDE_THE_TRACE = 1.4
"""The ratio of the memory that a compiler keeps to the trace's minimum: XLA kept 1.2 to 1.7 times
as much for the learning steps of four unlike merges on a CPU."""


class Work(NamedTuple):
    """The work of one run of a program.

    Attributes:
        flops: The number of floating-point operations of its matrix products.
        moved_bytes: The bytes that operations read from and write to memory, unless fused.
        kept_bytes: The estimated peak of all intermediate arrays that exist at one time, in bytes.
    """

    flops: float
    moved_bytes: float
    kept_bytes: int


def work_of(function: Callable[..., Any], *arguments: Any) -> Work:
    """Returns the work of a function of abstract arrays.

    Args:
        function: A pure function.
        *arguments: Pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    work = _trace_work(jax.make_jaxpr(function)(*arguments).jaxpr)
    return work._replace(kept_bytes=int(BESIDE_THE_TRACE * work.kept_bytes))


def bytes_of(tree: Any) -> int:
    """Returns the size in bytes of all arrays, real or abstract, of a pytree, on a device."""
    return sum(_size_on_device(leaf) for leaf in jax.tree.leaves(tree))


def _size_on_device(leaf: Any) -> int:
    if leaf.dtype == INT4:  # two share a byte
        return -(-prod(leaf.shape) // 2)
    return prod(leaf.shape) * leaf.dtype.itemsize


def _size(variable: Any) -> int:
    shape = getattr(variable.aval, "shape", ())
    dtype = getattr(variable.aval, "dtype", None)
    return prod(shape) * getattr(dtype, "itemsize", 0)


def _inner_programs(equation: Any) -> Iterator[Any]:
    """Yields the programs inside an operation."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _flops_of_product(equation: Any) -> float:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * prod(equation.outvars[0].aval.shape) * prod(left[axis] for axis in contracted)
    return 0.0


def _trace_work(jaxpr: Any) -> Work:
    """Returns the work of a program; memory follows from the lifetimes of arrays."""
    # The sources of a fused result live as long as the operations that use that result.
    sources: dict[Any, set[Any]] = {}
    exists: set[Any] = set()
    last_use: dict[Any, int] = {}
    inputs = {*jaxpr.invars, *jaxpr.constvars}

    def origins(variable: Any) -> set[Any]:
        if isinstance(variable, core.Literal) or variable in inputs:
            return set()
        return {variable} if variable in exists else sources.get(variable, set())

    outputs = {result for result in jaxpr.outvars if not isinstance(result, core.Literal)}
    for position, equation in enumerate(jaxpr.eqns):
        roots = set().union(*(origins(variable) for variable in equation.invars))
        for root in roots:
            last_use[root] = position
        is_unfused = equation.primitive.name in _UNFUSED or any(
            True for _ in _inner_programs(equation)
        )
        for result in equation.outvars:
            if is_unfused or result in outputs:
                exists.add(result)
                last_use[result] = position
            else:
                sources[result] = roots
    for result in outputs:
        for root in origins(result):
            last_use[root] = len(jaxpr.eqns)

    dying: dict[int, list[Any]] = {}
    for variable, position in last_use.items():
        dying.setdefault(position, []).append(variable)
    flops = moved = 0.0
    live = peak = 0
    for position, equation in enumerate(jaxpr.eqns):
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inside = [_trace_work(program) for program in _inner_programs(equation)]
        flops += _flops_of_product(equation) + times * sum(work.flops for work in inside)
        if inside:
            moved += times * sum(work.moved_bytes for work in inside)
        elif equation.primitive.name in _UNFUSED:
            moved += sum(map(_size, (*equation.invars, *equation.outvars)))
        live += sum(_size(result) for result in equation.outvars if result in exists)
        peak = max(peak, live + max((work.kept_bytes for work in inside), default=0))
        live -= sum(map(_size, dying.get(position, ())))
    return Work(flops, moved, peak)
