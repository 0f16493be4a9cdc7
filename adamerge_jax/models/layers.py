"""Layers that the architectures share, with the paths of Hugging Face checkpoints.

Checkpoint tensors keep PyTorch's layout, `(out, in)` for a linear layer. A parameter is an array
or lazy, such as a `Mixture`; modules read it through `value`, which mixes it where it is used.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree, Shaped

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import MERGED_WEIGHT, is_lazy
from adamerge_jax.models.cache import KeyValues, LayerCache
from adamerge_jax.models.rematerialization import Rematerialize
from adamerge_jax.parameter_names import STACKED
from adamerge_jax.task_vectors.offload.streamed import apart_from_layers, with_sources

Config = Any
"""A config of `transformers`, with the fields that the architecture at hand has.

Not the class itself, which takes seconds to import.
"""

LINEAR_OUTPUT = "linear_output"
"""The name of outputs of linear layers and of attention in a rematerialisation policy."""

POLICIES = {
    "weights": jax.checkpoint_policies.save_anything_except_these_names(MERGED_WEIGHT),
    "elementwise": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "layer": jax.checkpoint_policies.nothing_saveable,
}
"""The values of a layer that are kept for the backward pass, by what is computed again."""

Activation = Callable[[Array], Array]
"""A function of each value by itself."""


def _gelu(x: Array) -> Array:
    """Computes GELU by `erf`, in float32: `jax.nn.gelu` takes `erfc`, which costs twice as much."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activation functions by their names in `transformers` configs."""


def activation_of(name: str) -> Activation:
    """Returns the activation function of a name in a config.

    Raises:
        InputError: No function here has that name.
    """
    if name not in ACTIVATIONS:
        raise InputError(
            f"config.json: activation {name!r} is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class Outputs(NamedTuple):
    """The outputs of a backbone.

    Attributes:
        pooled: `[B, H]`, the input of classification heads, or None for a language model.
        last_hidden_state: `[B, T, H]`, after the last norm.
        hidden_states: `[L + 1, B, T, H]`, the embeddings and the output of each layer, or None
            if they were not asked for. As in `transformers`, a decoder's last entry is the
            last hidden state.
        cache: The keys and values of a decoder's tokens, where it was given those of earlier ones.
        inputs: The batch, where a head reads it too: to find the last token that is not padding.
    """

    pooled: Float[Array, "B H"] | None
    last_hidden_state: Float[Array, "B T H"]
    hidden_states: Float[Array, "L+1 B T H"] | None
    cache: KeyValues | None = None
    inputs: Mapping[str, Shaped[Array, "B ..."]] | None = None

    def examples(self, chosen: slice) -> "Outputs":
        """Returns the outputs of some of the examples."""
        states = None if self.hidden_states is None else self.hidden_states[:, chosen]
        pooled = None if self.pooled is None else self.pooled[chosen]
        inputs = self.inputs and {name: array[chosen] for name, array in self.inputs.items()}
        return Outputs(pooled, self.last_hidden_state[chosen], states, inputs=inputs)


def value(parameter: nnx.Param) -> Float[Array, "..."]:
    """Returns the parameter's array, computing it if it is lazy."""
    leaf = parameter.get_value()
    return leaf.materialize() if is_lazy(leaf) else leaf


def parameter(*shape: int) -> nnx.Param:
    """Returns a parameter of the given shape; its values come from a checkpoint."""
    return nnx.Param(jnp.zeros(shape))


class Linear(nnx.Module):
    """`x @ weight.T + bias`, weight `(out, in)`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        self.weight = parameter(outputs, inputs)
        if bias:
            self.bias = parameter(outputs)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        # Flat, because XLA's CPU backend contracts the weight's gradient over one axis faster than
        # over two.
        flat = x.reshape(-1, x.shape[-1])
        leaf = self.weight.get_value()
        y = leaf.apply(flat) if is_lazy(leaf) else flat @ leaf.T
        if hasattr(self, "bias"):
            y = y + value(self.bias)
        return checkpoint_name(y, LINEAR_OUTPUT).reshape(*x.shape[:-1], -1)


class LinearHead(nnx.Module):
    """A classification head of one linear layer, the parameters under `classifier.`."""

    def __init__(self, config: Config, outputs: int | None = None):
        """Makes the layer, with so many outputs in place of one for each class."""
        self.classifier = Linear(config.hidden_size, outputs or config.num_labels)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        return self.classifier(outputs.pooled)


class TokenHead(LinearHead):
    """A head of one linear layer on every token, the parameters under `classifier.`."""

    def __call__(self, outputs: Outputs) -> Float[Array, "B T C"]:
        return self.classifier(outputs.last_hidden_state)


class Prefixed(nnx.Module):
    """A backbone whose parameters begin with a prefix in a checkpoint, such as `bert.`."""

    def __init__(self, prefix: str, make: Callable[..., nnx.Module], *arguments: Any):
        self.prefix = prefix
        setattr(self, prefix, make(*arguments))

    def __call__(self, inputs: Mapping[str, Array], hidden_states: bool = False) -> Outputs:
        return getattr(self, self.prefix)(inputs, hidden_states)


class Embedding(nnx.Module):
    """Rows of `weight`, `(entries, features)`, by index."""

    def __init__(self, entries: int, features: int):
        self.weight = parameter(entries, features)

    def __call__(self, index: Int[Array, "..."]) -> Float[Array, "... H"]:
        leaf = self.weight.get_value()
        return leaf.rows(index) if is_lazy(leaf) else leaf[index]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, features: int, epsilon: float, *, bias: bool = True):
        self.weight = parameter(features)
        if bias:
            self.bias = parameter(features)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + self.epsilon)
        weight = self.weight.get_value()
        scaled = weight.times(normalised) if is_lazy(weight) else normalised * weight
        if hasattr(self, "bias"):
            scaled = scaled + value(self.bias)
        return scaled.astype(x.dtype)


def unit_mean_square(x: Float[Array, "... H"], epsilon: float) -> Float[Array, "... H"]:
    """Divides the vectors along the last axis by their root mean square, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel, as one matrix product over flattened patches."""

    def __init__(self, channels: int, features: int, patch: int, *, bias: bool):
        self.weight = parameter(features, channels, patch, patch)
        if bias:
            self.bias = parameter(features)
        self.patch = patch

    def __call__(self, pixels: Float[Array, "B channels height width"]) -> Float[Array, "B T H"]:
        batch, channels, height, width = pixels.shape
        rows, columns = height // self.patch, width // self.patch
        patches = pixels.reshape(batch, channels, rows, self.patch, columns, self.patch)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        weight = value(self.weight)
        embedded = patches.astype(weight.dtype) @ weight.reshape(weight.shape[0], -1).T
        return embedded + value(self.bias) if hasattr(self, "bias") else embedded


class Stack(nnx.Module):
    """L layers of one shape as one module, its parameters stacked along a leading axis.

    The layer sits at the attribute `*`, so that its parameters have names like
    `encoder.layer.*.output.dense.weight`. Compile time does not grow with L.
    """

    def __init__(
        self, make_layer: Callable[[], nnx.Module], length: int, rematerialize: Rematerialize
    ):
        graph, state = nnx.split(make_layer())
        stacked = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), state)
        setattr(self, STACKED, nnx.merge(graph, stacked))
        self.rematerialize = rematerialize

    def __call__(
        self,
        hidden: Float[Array, "B T H"],
        *arguments: PyTree,
        per_layer: PyTree[Shaped[Array, "L ..."]] = (),
        hidden_states: bool = False,
    ) -> tuple[Float[Array, "B T H"], Float[Array, "L+1 B T H"] | None]:
        """Runs `layer(hidden, *arguments, *layer_arguments)` for each layer in turn.

        Args:
            hidden: The first layer's input.
            *arguments: Arguments of all layers.
            per_layer: Further arguments, one row for each layer.
            hidden_states: Whether to return every layer's output.

        Returns:
            The last layer's output and, if asked for, the input followed by every layer's output.
        """
        graph, parameters = nnx.split(getattr(self, STACKED))
        parameters, sources = apart_from_layers(parameters)

        def run_layer(hidden: Array, parameters: nnx.State, layer_arguments: PyTree) -> Array:
            layer = nnx.merge(graph, with_sources(parameters, sources))
            return layer(hidden, *arguments, *layer_arguments)

        if self.rematerialize != "nothing":
            # A scan's body is not subject to the common-subexpression elimination that
            # `prevent_cse` guards against, and the guard costs time.
            run_layer = jax.checkpoint(
                run_layer, policy=POLICIES[self.rematerialize], prevent_cse=False
            )

        def body(hidden: Array, layer: tuple[nnx.State, PyTree]) -> tuple[Array, Array | None]:
            hidden = run_layer(hidden, *layer)
            return hidden, hidden if hidden_states else None

        last, states = jax.lax.scan(body, hidden, (parameters, per_layer))
        return last, jnp.concatenate([hidden[None], states]) if hidden_states else None

    def continued(
        self,
        hidden: Float[Array, "B T H"],
        cache: KeyValues,
        *arguments: PyTree,
        per_layer: PyTree[Shaped[Array, "L ..."]] = (),
    ) -> tuple[Float[Array, "B T H"], KeyValues]:
        """Runs the layers behind tokens whose keys and values are cached.

        Each layer is called with its part of the cache as one more argument.

        Args:
            hidden: The first layer's input.
            cache: The keys and values of the tokens before.
            *arguments: Arguments of all layers.
            per_layer: Further arguments, one row for each layer.

        Returns:
            The last layer's output, and the cache with the new tokens' keys and values.
        """
        graph, parameters = nnx.split(getattr(self, STACKED))
        parameters, sources = apart_from_layers(parameters)

        def body(
            carried: tuple[Array, KeyValues], layer: tuple[nnx.State, PyTree, Array]
        ) -> tuple[tuple[Array, KeyValues], None]:
            hidden, whole = carried
            layer_parameters, layer_arguments, index = layer
            part = LayerCache(whole, index)
            run = nnx.merge(graph, with_sources(layer_parameters, sources))
            hidden = run(hidden, *arguments, *layer_arguments, part)
            return (hidden, part.whole), None

        numbers = jnp.arange(len(cache.keys))
        carried, _ = jax.lax.scan(body, (hidden, cache), (parameters, per_layer, numbers))
        hidden, cache = carried
        return hidden, cache.filled_by(hidden.shape[1])


def attention(
    query: Float[Array, "B T H"],
    key: Float[Array, "B S shared"],
    value: Float[Array, "B S shared"],
    heads: int,
    bias: Float[Array, "#B #heads #T S"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H"]:
    """Computes scaled dot-product attention over `heads` heads, the softmax in float32.

    Args:
        query: Projected queries, heads side by side in the last axis.
        key: Projected keys. Where they are narrower than the queries they have fewer heads, and
            neighbouring heads of queries share one.
        value: Projected values, as many heads as of keys.
        heads: Number of heads of queries; H is divisible by it.
        bias: Added to the scores before the softmax (`padding_bias`, `causal_bias`).
        scale: The factor of products of queries and keys, `(H / heads)**-0.5` if None.
        soft_cap: Scaled scores are bent by `soft_cap * tanh(score / soft_cap)`, unless None.
    """
    batch, length, width = query.shape
    features = width // heads
    groups = key.shape[-1] // features
    sharing = heads // groups

    def split(x: Float[Array, "B S shared"]) -> Float[Array, "B*groups S features"]:
        x = x.reshape(*x.shape[:2], groups, features).swapaxes(1, 2)
        return x.reshape(batch * groups, *x.shape[2:])

    # One leading batch axis, because XLA's CPU backend runs products with two of them, or with one
    # in the middle, at half the speed. The queries of heads that share keys are further rows of
    # one product, so that no key is repeated.
    query = query.reshape(batch, length, groups, sharing, features).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch * groups, sharing * length, features)
    key, value = split(key), split(value)
    scores = jnp.einsum("btd,bsd->bts", query, key, preferred_element_type=jnp.float32)
    scores = scores * (features**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = capped(scores, soft_cap)
    if bias is not None:
        by_head = scores.reshape(batch, heads, length, -1) + bias
        scores = by_head.reshape(scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bts,bsd->btd", weights, value)
    mixed = mixed.reshape(batch, heads, length, features).swapaxes(1, 2)
    return checkpoint_name(mixed.reshape(batch, length, width), LINEAR_OUTPUT)


def capped(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Bends values smoothly into the range from -cap to cap; small ones hardly change."""
    return jnp.tanh(x / cap) * cap


def padding_bias(attention_mask: Int[Array, "B S"]) -> Float[Array, "B 1 1 S"]:
    """Returns zero where the mask is 1, the lowest finite float32 where it is 0."""
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(attention_mask[:, None, None, :] > 0, 0.0, lowest)


def causal_bias(length: int) -> Float[Array, "1 1 T T"]:
    """Returns zero at and before each position, the lowest finite float32 after it."""
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(jnp.tri(length, dtype=bool), 0.0, lowest)[None, None]
