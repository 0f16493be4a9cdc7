"""The keys and values of the tokens that a decoder has read, so that it reads each token once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KeyValues(NamedTuple):
    """The keys and values of all layers, with room for tokens to come.

    Attributes:
        keys: Keys as attention uses them, after the rotation of positions, `[L, B, S, features]`.
        values: Values, `[L, B, S, features]`.
        filled: The number of tokens that have been read; theirs are the first of the S places.
    """

    keys: Float[Array, "L B S features"]
    values: Float[Array, "L B S features"]
    filled: Int[Array, ""]

    @classmethod
    def empty(
        cls, layers: int, examples: int, places: int, features: int, dtype: jnp.dtype
    ) -> "KeyValues":
        """Makes a cache that holds nothing.

        Args:
            layers: The number of layers, L.
            examples: The number of sequences, B.
            places: The number of tokens that it has room for, S.
            features: The features of a token's keys in one layer, all heads together.
            dtype: The dtype of activations.
        """
        zeros = jnp.zeros((layers, examples, places, features), dtype)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32))

    def filled_by(self, tokens: int) -> "KeyValues":
        """Returns the cache after so many tokens more."""
        return self._replace(filled=self.filled + tokens)


class LayerCache:
    """One layer's part of the cache, to which its attention adds.

    Attributes:
        whole: The cache of all layers, with what was added.
    """

    def __init__(self, whole: KeyValues, layer: Int[Array, ""]):
        """Chooses a layer by its number."""
        self.whole = whole
        self._layer = layer

    def positions(self, count: int) -> Int[Array, " T"]:
        """Returns the places of so many new tokens."""
        return self.whole.filled + jnp.arange(count)

    def add(
        self, keys: Float[Array, "B T features"], values: Float[Array, "B T features"]
    ) -> tuple[Float[Array, "B S features"], Float[Array, "B S features"]]:
        """Adds the keys and values of new tokens; returns those of all places."""
        zero = jnp.zeros((), jnp.int32)
        start = (self._layer, zero, self.whole.filled, zero)
        filled = self.whole.filled

        def put(array: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(array, new[None].astype(array.dtype), start)

        def of_layer(array: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(array, self._layer, keepdims=False)

        self.whole = KeyValues(put(self.whole.keys, keys), put(self.whole.values, values), filled)
        return of_layer(self.whole.keys), of_layer(self.whole.values)
