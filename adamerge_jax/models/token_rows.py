"""Texts as the rows that a model computes on: each in a row of its own, or several behind another.

A batch of texts is `[B, T]`, padded to its longest. Packed, its tokens lie in fewer rows `[R, L]`
without padding between them, those of a text behind each other; the model computes on these, and
returns its outputs by text again.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from adamerge_jax.models.layers import Outputs, Stack, padding_bias

SLOTS = "packed_slots"
"""The input `[R, L]` that says which token lies in each slot of a row: text * T + token, or -1."""

PLACES = "packed_places"
"""The input `[B, T]` that says in which slot each token lies: row * L + slot; 0 for padding."""


class TokenRows(Protocol):
    """The rows that a batch of texts `[B, T]` is computed in."""

    @property
    def positions(self) -> Int[Array, "... L"]:
        """The position of each slot's token in its text, of one row where all are alike."""
        ...

    @property
    def bias(self) -> Float[Array, "R 1 #L L"]:
        """The term of scores of attention by which no token sees another text, or padding."""
        ...

    def in_rows(self, tokens: Int[Array, "B T"]) -> Int[Array, "R L"]:
        """Returns numbers of tokens, such as their ids, by row."""
        ...

    def by_text(self, hidden: Float[Array, "... R L H"]) -> Float[Array, "... B T H"]:
        """Returns hidden states by text; those of padding are those of some token."""
        ...

    def first_of_texts(self, hidden: Float[Array, "R L H"]) -> Float[Array, "B H"]:
        """Returns the hidden state of each text's first token."""
        ...


class PaddedRows(NamedTuple):
    """A row for each text: `R = B`, `L = T`."""

    mask: Int[Array, "B T"]

    @property
    def positions(self) -> Int[Array, " T"]:
        """The position of each slot's token in its text, of one row where all are alike."""
        return jnp.arange(self.mask.shape[1])

    @property
    def bias(self) -> Float[Array, "B 1 1 T"]:
        """The term of scores of attention by which no token sees another text, or padding."""
        return padding_bias(self.mask)

    def in_rows(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Returns numbers of tokens, such as their ids, by row."""
        return tokens

    def by_text(self, hidden: Float[Array, "... B T H"]) -> Float[Array, "... B T H"]:
        """Returns hidden states by text; those of padding are those of some token."""
        return hidden

    def first_of_texts(self, hidden: Float[Array, "B T H"]) -> Float[Array, "B H"]:
        """Returns the hidden state of each text's first token."""
        return hidden[:, 0]


class PackedRows(NamedTuple):
    """Rows of several texts."""

    slots: Int[Array, "R L"]
    places: Int[Array, "B T"]

    @property
    def positions(self) -> Int[Array, "R L"]:
        """The position of each slot's token in its text, of one row where all are alike."""
        return jnp.maximum(self.slots, 0) % self.places.shape[1]

    @property
    def bias(self) -> Float[Array, "R 1 L L"]:
        """The term of scores of attention by which no token sees another text, or padding."""
        texts = self.slots // self.places.shape[1]  # -1 where a slot is empty
        lowest = jnp.finfo(jnp.float32).min
        return jnp.where(texts[:, None, :, None] == texts[:, None, None, :], 0.0, lowest)

    def in_rows(self, tokens: Int[Array, "B T"]) -> Int[Array, "R L"]:
        """Returns numbers of tokens, such as their ids, by row."""
        return tokens.reshape(-1)[jnp.maximum(self.slots, 0)]

    def by_text(self, hidden: Float[Array, "... R L H"]) -> Float[Array, "... B T H"]:
        """Returns hidden states by text; those of padding are those of some token."""
        *layers, _, _, features = hidden.shape
        return hidden.reshape(*layers, -1, features)[..., self.places, :]

    def first_of_texts(self, hidden: Float[Array, "R L H"]) -> Float[Array, "B H"]:
        """Returns the hidden state of each text's first token."""
        return hidden.reshape(-1, hidden.shape[-1])[self.places[:, 0]]


def token_rows(inputs: Mapping[str, Array], mask: Int[Array, "B T"]) -> TokenRows:
    """Returns the rows that a batch of texts is computed in.

    Args:
        inputs: The batch, perhaps with `SLOTS` and `PLACES`.
        mask: 1 where there is a token, 0 for padding.
    """
    if SLOTS in inputs:
        return PackedRows(inputs[SLOTS], inputs[PLACES])
    return PaddedRows(mask)


def distances(length: int) -> Int[Array, "L L"]:
    """Returns the number of each of a row's slots less that of each other one.

    Between tokens of one text, which lie behind each other, it is the difference of positions.
    """
    slots = jnp.arange(length)
    return slots[:, None] - slots


def encode(
    layers: Stack,
    embedded: Float[Array, "R L H"],
    rows: TokenRows,
    hidden_states: bool,
    *arguments: PyTree,
    position_bias: Float[Array, "*#R heads L L"] | None = None,
    per_layer: PyTree[Shaped[Array, "layers ..."]] = (),
    norm: Callable[[Array], Array] | None = None,
) -> Outputs:
    """Runs the layers of an encoder, and returns their outputs by text.

    Args:
        layers: The layers, whose second argument is the term of scores of attention.
        embedded: The embedded tokens by row.
        rows: The rows that the texts are in.
        hidden_states: Whether to return every layer's output.
        *arguments: Further arguments of all layers.
        position_bias: A term of scores of attention by the distance of tokens, where there is one.
        per_layer: Further arguments, one row for each layer.
        norm: The normalisation behind the last layer. As in `transformers`, the last hidden state
            is the one after it.

    Returns:
        The outputs; `pooled` is the last state of each text's first token.
    """
    bias = rows.bias if position_bias is None else rows.bias + position_bias
    last, states = layers(
        embedded, bias, *arguments, per_layer=per_layer, hidden_states=hidden_states
    )
    if norm is not None:
        last = norm(last)
    if states is not None:
        states = rows.by_text(states if norm is None else states.at[-1].set(last))
    return Outputs(rows.first_of_texts(last), rows.by_text(last), states)
