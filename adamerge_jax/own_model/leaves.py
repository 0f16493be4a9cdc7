"""A model of any kind taken apart into arrays by name, and put together again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from adamerge_jax.checkpoints.fingerprint import fingerprint_of_arrays
from adamerge_jax.errors import InputError, and_more, shorten
from adamerge_jax.parameter_names import is_stacked, leaf_name, tensors_of

Model = TypeVar("Model")
"""A pytree of any kind, a Flax NNX module included."""


class Leaves(NamedTuple, Generic[Model]):
    """The leaves of a model.

    Attributes:
        role: Its role, for messages: `base`, or `expert 'law'`.
        parameters: The floating-point arrays by name, `[*shape]`, `[L, *shape]` where stacked.
        others: The arrays that are not merged, such as counters and random keys, by name.
        static: What is no array, such as functions and numbers of Python, by name.
        rebuild: From all arrays by name to the model.
    """

    role: str
    parameters: dict[str, Array]
    others: dict[str, Array]
    static: dict[str, Any]
    rebuild: Callable[[Mapping[str, Array]], Model]

    @property
    def arrays(self) -> dict[str, Array]:
        """All arrays by name."""
        return {**self.parameters, **self.others}

    @property
    def identity(self) -> str:
        """A fingerprint of the parameters, from a sample of their values."""
        return fingerprint_of_arrays(self.parameters)


def take_apart(model: Model, role: str) -> Leaves[Model]:
    """Takes a model apart.

    A leaf's name is its dotted path. That of an NNX variable is without its `value`.

    Args:
        model: Any pytree, or a Flax NNX module.
        role: Its role, for messages.

    Raises:
        InputError: A leaf looks like an array and is none, two have the same name, or none is a
            floating-point array.
    """
    tree, put_together = _as_tree(model)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(path) for path, _ in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{role}: two leaves are called {twice!r}; rename one of them")
    parameters: dict[str, Array] = {}
    others: dict[str, Array] = {}
    static: dict[str, Any] = {}
    for name, (_, leaf) in zip(names, paths, strict=True):
        if isinstance(leaf, jax.Array | np.ndarray):
            is_merged = jnp.issubdtype(leaf.dtype, jnp.floating)
            (parameters if is_merged else others)[name] = leaf
        elif hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic):
            kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
            raise InputError(
                f"{role}: leaf {name!r} is a {kind}, expected an array of JAX or NumPy; convert "
                "it, or restore it from its checkpoint"
            )
        else:
            static[name] = leaf
    if not parameters:
        raise InputError(
            f"{role}: no leaf of this {type(model).__name__} is a floating-point array; give the "
            "model's parameters"
        )
    if "" in names:
        raise InputError(
            f"{role}: is a single array; give a pytree whose leaves have names, such as "
            "{'kernel': array}"
        )

    def rebuild(arrays: Mapping[str, Array]) -> Model:
        leaves = [arrays[name] if name in arrays else static[name] for name in names]
        return put_together(jax.tree_util.tree_unflatten(structure, leaves))

    return Leaves(role, parameters, others, static, rebuild)


def _as_tree(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns a pytree of a model's arrays, and the function that makes the model of another."""
    if not isinstance(model, nnx.Module):
        return model, lambda tree: tree
    # As a pytree a module would have an array that it shares once for each place.
    graph, state = nnx.split(model)
    return state, lambda tree: nnx.merge(graph, tree)


def _name(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return leaf_name(path)


def require_alike(
    base: Leaves[Model], expert: Leaves[Any], other_shapes: Sequence[str] = ()
) -> None:
    """Refuses an expert with other leaves than the base.

    Args:
        base: The base.
        expert: The expert.
        other_shapes: Names of parameters that may have other shapes: those of heads.

    Raises:
        InputError: Names the leaf, and says what each of the two has.
    """
    ours, theirs = base.arrays, expert.arrays
    if different := sorted(ours.keys() ^ theirs.keys()):
        name = different[0]
        has, lacks = (base, expert) if name in ours else (expert, base)
        what = "no array" if name in lacks.static else "not"
        raise InputError(
            f"{expert.role}: leaf {name!r} is an array in {has.role} and {what} in {lacks.role}"
            f"{and_more(len(different) - 1)}; experts must have the base's structure"
        )
    for name, array in ours.items():
        shapes = array.shape, theirs[name].shape
        if shapes[0] != shapes[1] and name not in other_shapes:
            raise InputError(
                f"{expert.role}: leaf {name!r} has shape {shapes[1]}, the base has {shapes[0]}"
                f"; if each task keeps its own, give head_parameters=[{name!r}]"
            )
        if (name in base.parameters) != (name in expert.parameters):
            raise InputError(
                f"{expert.role}: leaf {name!r} is {theirs[name].dtype}, the base has {array.dtype}"
            )
        if jnp.issubdtype(array.dtype, jnp.complexfloating) and _differ(array, theirs[name]):
            raise InputError(
                f"{expert.role}: leaf {name!r} is {array.dtype} and differs from the base's; only "
                "real numbers are merged: keep their real and imaginary parts in two arrays"
            )
    for name, value in base.static.items():
        other = expert.static.get(name, value)
        if isinstance(value, int | float | np.generic) and value != other:
            raise InputError(
                f"{expert.role}: leaf {name!r} is {shorten(repr(other))}, the base has "
                f"{shorten(repr(value))}; only arrays are merged: make it an array, or equal"
            )


def _differ(first: Array, second: Array) -> bool:
    return bool((np.asarray(first) != np.asarray(second)).any())


def require_finite(model: Leaves[Any]) -> None:
    """Refuses parameters that are NaN or infinite.

    Raises:
        InputError: Names the leaf.
    """
    for name, array in model.parameters.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError(
                f"{model.role}: leaf {name!r} has a number that is NaN or infinite in float32; its "
                "training has probably diverged: use an earlier checkpoint, or leave it out"
            )


def places(parameters: Mapping[str, Array]) -> Iterator[tuple[str, str, int | None]]:
    """Yields each tensor's name without `*`, its parameter, and its layer where that is stacked."""
    for name, array in parameters.items():
        stacked = is_stacked(name)
        for layer, tensor in enumerate(tensors_of(name, array.shape)):
            yield tensor, name, layer if stacked else None
