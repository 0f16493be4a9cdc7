"""Greedy continuations by a decoder language model, with cached keys and values where it has them.

Without a cache each new token takes a forward pass over all that is before it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adamerge_jax.models.cache import KeyValues
from adamerge_jax.models.family import Family, Network, complete_head
from adamerge_jax.models.layers import Config
from adamerge_jax.models.rotary import require_one_rotation


class Continuations(NamedTuple):
    """The tokens behind B prompts.

    Attributes:
        tokens: The likeliest next tokens one after the other, `[B, N]`. Behind a token that stops
            they mean nothing.
        lengths: The number of them before the first that stops, `[B]`; N where none does.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]


Generate = Callable[..., Continuations]
"""The compiled function `(parameters, token_ids, mask, stops, new_tokens, beside)`, which returns
`Continuations`."""


_Memory = tuple[Int[Array, "B S"], KeyValues] | None
"""The mask, 1 for tokens and 0 for padding and places without one, and the keys and values of all
tokens but the last; None for a model without a cache."""


class _Writing(NamedTuple):
    """The state of the loop over new tokens.

    Attributes:
        step: The number of tokens written.
        tokens: The written tokens, `[B, N]`, 0 for those to come.
        is_ended: True for each sequence that has stopped, `[B]`.
        lengths: The tokens of each before that, `[B]`.
        memory: The mask, `[B, S]`, and the cache.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B N"]
    is_ended: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    memory: _Memory

    @classmethod
    def empty(cls, examples: int, new_tokens: int, memory: _Memory) -> "_Writing":
        """Returns the state before the first token."""
        return cls(
            jnp.zeros((), jnp.int32),
            jnp.zeros((examples, new_tokens), jnp.int32),
            jnp.zeros(examples, bool),
            jnp.zeros(examples, jnp.int32),
            memory,
        )

    def write(
        self, token: Int[Array, " B"], memory: _Memory, stops: Int[Array, " stops"]
    ) -> "_Writing":
        """Returns the state with one more token, and the memory with which it was found."""
        is_ended = self.is_ended | (token[:, None] == stops).any(-1)
        return _Writing(
            self.step + 1,
            jax.lax.dynamic_update_index_in_dim(self.tokens, token, self.step, axis=1),
            is_ended,
            self.lengths + ~is_ended,
            memory,
        )


def make_greedy(family: Family, config: Config, backbone: Network, head: Network) -> Generate:
    """Returns the function that continues prompts with the likeliest token, one after the other.

    It is compiled once for each shape of the prompts and number of new tokens, and ends as soon as
    all sequences have stopped. Its arguments:

    - `parameters`: Those of backbone and output layer by name, arrays or `Mixture`s.
    - `token_ids`: The prompts, `[B, T]`, padded on either side.
    - `mask`: 1 for tokens, 0 for padding, `[B, T]`.
    - `stops`: The tokens that end a text, `[stops]`, perhaps none.
    - `new_tokens`: N, the largest number of tokens.
    - `beside`: The inputs beside the tokens that are continued, `[B, ...]`: an encoder-decoder's
      prompts, whose `token_ids` are the beginning of what the decoder writes, or images with the
      positions of all `T + N` tokens.

    Args:
        family: The architecture, which `writes`.
        config: The model's config.
        backbone: The model without its output layer.
        head: The output layer.
    """
    if family.cached_features is None:
        return _make_greedy_anew(backbone, head, "decoder_" if family.encodes_prompts else "")
    features = family.cached_features(config)

    @partial(jax.jit, static_argnames="new_tokens")
    def generate(
        parameters: Mapping[str, Array],
        token_ids: Int[Array, "B T"],
        mask: Int[Array, "B T"],
        stops: Int[Array, " stops"],
        new_tokens: int,
        beside: Mapping[str, Array] | None = None,
    ) -> Continuations:
        output_layer = complete_head(head, {}, parameters)
        examples, length = token_ids.shape
        require_one_rotation(config, length, length + new_tokens)
        token_ids, mask = _to_the_right(token_ids, mask)
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        dtype = jax.eval_shape(backbone, parameters, inputs).last_hidden_state.dtype

        def read(
            tokens: Int[Array, "B T"], mask: Int[Array, "B S"], cache: KeyValues
        ) -> tuple[Int[Array, " B"], KeyValues]:
            """Returns the likeliest token behind the given ones."""
            inputs = {"input_ids": tokens, "attention_mask": mask}
            outputs = backbone(parameters, inputs, cache=cache)
            last = outputs._replace(last_hidden_state=outputs.last_hidden_state[:, -1:])
            logits: Float[Array, "B V"] = head(output_layer, last)[:, 0]
            return logits.argmax(-1).astype(jnp.int32), outputs.cache

        def go_on(state: _Writing) -> _Writing:
            mask, cache = state.memory
            mask = mask.at[:, length + state.step - 1].set(1)
            last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
            token, cache = read(last, mask, cache)
            return state.write(token, (mask, cache), stops)

        places = length + new_tokens
        mask = jnp.pad(mask, [(0, 0), (0, new_tokens)])
        cache = KeyValues.empty(config.num_hidden_layers, examples, places, features, dtype)
        token, cache = read(token_ids, mask, cache)
        start = _Writing.empty(examples, new_tokens, (mask, cache))
        return _to_the_end(start.write(token, (mask, cache), stops), go_on)

    return generate


def _make_greedy_anew(backbone: Network, head: Network, prefix: str) -> Generate:
    """Returns the function of `make_greedy` for a model without a cache.

    Prompts lie on the left, where a model that counts positions by their places starts, and no
    token of a decoder sees the padding behind it.

    Args:
        backbone: The model without its output layer.
        head: The output layer.
        prefix: The beginning of the names of the inputs that are continued.
    """

    @partial(jax.jit, static_argnames="new_tokens")
    def generate(
        parameters: Mapping[str, Array],
        token_ids: Int[Array, "B T"],
        mask: Int[Array, "B T"],
        stops: Int[Array, " stops"],
        new_tokens: int,
        beside: Mapping[str, Array] | None = None,
    ) -> Continuations:
        output_layer = complete_head(head, {}, parameters)
        order = jnp.argsort(mask < 1, axis=1, stable=True)
        prompts = jnp.take_along_axis(token_ids, order, axis=1)
        prompt_lengths = (mask > 0).sum(1)
        prompts = jnp.pad(prompts, [(0, 0), (0, new_tokens)])
        rows = jnp.arange(len(prompts))
        places = prompt_lengths[:, None] + jnp.arange(new_tokens)

        def go_on(state: _Writing) -> _Writing:
            ends = prompt_lengths + state.step
            written = jnp.arange(prompts.shape[1]) < ends[:, None]
            inputs = {
                **(beside or {}),
                f"{prefix}input_ids": prompts.at[rows[:, None], places].set(state.tokens),
                f"{prefix}attention_mask": written.astype(mask.dtype),
            }
            outputs = backbone(parameters, inputs)
            last = outputs.last_hidden_state[rows, ends - 1][:, None]
            logits = head(output_layer, outputs._replace(last_hidden_state=last))[:, 0]
            return state.write(logits.argmax(-1).astype(jnp.int32), None, stops)

        return _to_the_end(_Writing.empty(len(prompts), new_tokens, None), go_on)

    return generate


def _to_the_end(start: _Writing, go_on: Callable[[_Writing], _Writing]) -> Continuations:
    """Writes tokens until all places are filled or all sequences have stopped."""
    new_tokens = start.tokens.shape[1]
    state = jax.lax.while_loop(
        lambda state: (state.step < new_tokens) & ~state.is_ended.all(), go_on, start
    )
    return Continuations(state.tokens, state.lengths)


def _to_the_right(
    token_ids: Int[Array, "B T"], mask: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Moves padding to the left, so that the next token of all sequences has one place.

    Rotations of positions and windows depend on distances alone.
    """
    order = jnp.argsort(mask > 0, axis=1, stable=True)
    return (
        jnp.take_along_axis(token_ids, order, axis=1),
        jnp.take_along_axis(mask, order, axis=1),
    )
