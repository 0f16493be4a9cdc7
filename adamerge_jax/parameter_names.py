"""Parameter names: those of the Hugging Face checkpoint, with `*` where layers are stacked.

`encoder.layer.*.output.dense.weight` is one array with a leading axis of length L; it stands for
the L tensors `encoder.layer.0.output.dense.weight`, `encoder.layer.1.output.dense.weight`, ...
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import jax
from jaxtyping import Array, PyTree

STACKED = "*"


def is_stacked(name: str) -> bool:
    """Returns True where the name stands for L tensors along a leading axis."""
    return STACKED in name.split(".")


def unstack(name: str, length: int) -> list[str]:
    """Returns the names of the `length` tensors that a stacked name stands for, in order."""
    before, _, after = name.partition(STACKED)
    return [f"{before}{index}{after}" for index in range(length)]


def tensors_of(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the checkpoint tensors that a parameter of the given (stacked) shape consists of."""
    return unstack(name, shape[0]) if is_stacked(name) else [name]


def layers_of(name: str, shape: tuple[int, ...]) -> int:
    """Returns the number of checkpoint tensors that a parameter consists of: L, or 1."""
    return shape[0] if is_stacked(name) else 1


def tensor_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of each tensor that a parameter of a (stacked) shape consists of."""
    return shape[1:] if is_stacked(name) else shape


def unstacked_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns shapes by the names of checkpoint tensors, from those of (stacked) parameters."""
    return {
        tensor: tensor_shape(name, shape)
        for name, shape in shapes.items()
        for tensor in tensors_of(name, shape)
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns True where a name fits a shell-style pattern (`classifier.*`, `*.bias`)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_batch_statistic(name: str) -> bool:
    """Returns True for a mean or a variance that a batch normalisation of PyTorch keeps."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def is_variance(name: str) -> bool:
    """Returns True for the variances that a batch normalisation keeps, in PyTorch or in Flax."""
    return name.rpartition(".")[2] in ("running_var", "var")


def numbered_block(name: str) -> str:
    """Returns the name up to its first number (or `*`), or nothing where it has none."""
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        if part == STACKED or part.isdigit():
            return ".".join(parts[:depth])
    return ""


def layer_of(name: str, names: Iterable[str]) -> str:
    """Returns the layer that a parameter belongs to, among the parameters `names` of one model.

    `encoder.layer.*.output.dense.weight` is in `encoder.layer.*`; a parameter outside the numbered
    blocks is in the outermost module that holds none of them, nor all parameters: that of
    `params.Dense_0.kernel` is `params.Dense_0` where all names begin with `params`.
    """
    block = numbered_block(name)
    if block:
        return block
    names = list(names)
    holders = {
        ".".join(parts[:depth])
        for other in names
        if (parts := numbered_block(other).split(".")[:-1])
        for depth in range(1, len(parts) + 1)
    }
    parts = name.split(".")
    for depth in range(1, len(parts)):
        module = ".".join(parts[:depth])
        holds_all = depth < len(parts) - 1 and all(n.startswith(f"{module}.") for n in names)
        if module not in holders and not holds_all:
            return module
    return name


def leaf_name(path: tuple) -> str:
    """Returns the dotted name of a pytree leaf, from its `jax.tree_util` key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def place_in_stack(name: str) -> tuple[str, int] | None:
    """Returns the stacked name that a tensor belongs to and its layer; None outside of stacks.

    A name's first number is its layer: `encoder.layer.3.output.dense.weight` is layer 3 of
    `encoder.layer.*.output.dense.weight`.
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:position], STACKED, *parts[position + 1 :]]), int(part)
    return None


def stack_of(stacked: str) -> str:
    """Returns `encoder.layer.*` of `encoder.layer.*.output.dense.weight`."""
    return stacked.partition(STACKED)[0] + STACKED


def stack_depths(tensors: Iterable[str]) -> dict[str, int]:
    """Returns the number of layers of each stack of tensors, by names like `encoder.layer.*`."""
    depths: dict[str, int] = {}
    for name in tensors:
        if place := place_in_stack(name):
            stack = stack_of(place[0])
            depths[stack] = max(depths.get(stack, 0), place[1] + 1)
    return depths


def named_leaves(tree: PyTree[Array]) -> dict[str, Array]:
    """Returns the leaves of a pytree by their dotted names."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
