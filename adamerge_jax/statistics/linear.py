"""The linear layers of a model: their order, and the rows of their inputs that are no padding.

Both are read off the model itself, which is traced on abstract arrays; no architecture says them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import Mixture
from adamerge_jax.parameter_names import is_stacked, stack_of
from adamerge_jax.statistics.tap import tap

Run = Callable[[Mapping[str, Array | Mixture], Mapping[str, Array]], Any]
"""The function `(parameters, inputs)` that runs the part of a model which all tasks share."""

_EXAMPLES, _TOKENS, _DECODER_TOKENS = 5, 2, 3
"""Sizes of the traced batch, by which the rows of a layer's inputs are told apart."""

MASK, DECODER_MASK = "attention_mask", "decoder_attention_mask"

_OF_TOKENS = ("_ids", "_mask")
"""Endings of the names of arrays whose last axis is that of tokens."""


class Layer(NamedTuple):
    """Linear layers that run side by side or one shortly after the other: one layer of a model.

    Attributes:
        names: The names of their weights, in the order in which they are used.
        stack: The stack that they belong to, such as `encoder.layer.*`, or None.
        number: The layer of the stack, or None.
        norms: The names of the weights of normalisations in this layer of the stack.
    """

    names: tuple[str, ...]
    stack: str | None = None
    number: int | None = None
    norms: tuple[str, ...] = ()


class Linear(NamedTuple):
    """The linear layers of a model.

    Attributes:
        masks: For each weight the input that has 1 where a row of its layer's inputs is no
            padding, or None where every example has the same number of rows, in the order of use.
            Weights of normalisations are among them.
        layers: The layers of the model in the order in which they run.
    """

    masks: dict[str, str | None]
    layers: list[Layer]


def find_linear(
    run: Run,
    parameters: Mapping[str, Array | Mixture],
    inputs: Mapping[str, Shaped[Array, "B ..."]],
) -> Linear:
    """Finds the linear layers of a model.

    A weight is one of a linear layer if it is applied to inputs (`Lazy.apply`) and no row of it is
    looked up: an embedding table that is the output layer too is none. A vector that normalised
    inputs are multiplied with (`Lazy.times`) is the weight of a normalisation.

    Args:
        run: The model; it is traced only.
        parameters: Its parameters.
        inputs: A batch, of which only shapes and dtypes are looked at.

    Raises:
        InputError: No linear layer shows its inputs.
    """
    rows: dict[str, int] = {}
    tables = set()

    def observe(name: str, layer: Array | None, x: Float[Array, "N n"] | None) -> None:
        if x is None:
            tables.add(name)
        else:
            rows[name] = len(x)

    def traced(parameters: Mapping[str, Array | Mixture], inputs: Mapping[str, Array]) -> None:
        names = [name for name, leaf in parameters.items() if _axes(name, leaf) in (1, 2)]
        run(tap(parameters, names, observe), inputs)

    jax.eval_shape(traced, parameters, _small_batch(inputs))
    by_rows = {}
    if "input_ids" in inputs:
        texts = _EXAMPLES * math.prod(inputs["input_ids"].shape[1:-1])  # two of each pair
        by_rows = {texts * _TOKENS: MASK, texts * _DECODER_TOKENS: DECODER_MASK}
    masks = {name: by_rows.get(count) for name, count in rows.items() if name not in tables}
    layers = _layers_of(masks, parameters)
    if not layers:
        raise InputError(
            "no linear layer of this model shows its inputs, from which the method merges weights; "
            "models that are run by their own PyTorch forward show none: take a method that needs "
            "no data, such as tsv_m, or fisher"
        )
    return Linear(masks, layers)


def row_weights(
    mask: str | None,
    inputs: Mapping[str, Shaped[Array, "B ..."]],
    examples: Float[Array, " B"],
    rows: int,
) -> Float[Array, " N"]:
    """Returns the weight of each row of a layer's inputs: its example's, or 0 for padding.

    Args:
        mask: The name of the input that is 0 for padding; see `Linear.masks`.
        inputs: The batch.
        examples: The weight of each example.
        rows: The number of rows, N.
    """
    if mask in inputs:
        present = inputs[mask] > 0
        return (present * jnp.expand_dims(examples, range(1, present.ndim))).reshape(-1)
    return examples.repeat(rows // len(examples))


def _axes(name: str, leaf: Array | Mixture) -> int:
    base = leaf.base if isinstance(leaf, Mixture) else leaf
    return base.ndim - is_stacked(name)


def _small_batch(
    inputs: Mapping[str, Shaped[Array, "B ..."]],
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract batch whose numbers of examples, tokens and decoder tokens all differ."""
    small = {}
    for name, array in inputs.items():
        shape = (_EXAMPLES, *array.shape[1:])
        if "input_ids" in inputs and array.ndim >= 2 and name.endswith(_OF_TOKENS):
            length = _DECODER_TOKENS if name.startswith("decoder_") else _TOKENS
            shape = (*shape[:-1], length)
        small[name] = jax.ShapeDtypeStruct(shape, array.dtype)
    return small


def _layers_of(names: Sequence[str], parameters: Mapping[str, Array | Mixture]) -> list[Layer]:
    """Returns the layers of a model from the names of its weights in the order of use."""
    by_stack: dict[str, list[str]] = {}
    for name in names:
        by_stack.setdefault(stack_of(name) if is_stacked(name) else name, []).append(name)
    layers = []
    for stack, members in by_stack.items():
        linear = tuple(name for name in members if _axes(name, parameters[name]) == 2)
        if not linear:
            continue
        if stack in names:
            layers.append(Layer(linear))
            continue
        norms = tuple(name for name in members if name not in linear)
        depth = len(jax.tree.leaves(parameters[members[0]])[0])
        layers += [Layer(linear, stack, number, norms) for number in range(depth)]
    return layers
