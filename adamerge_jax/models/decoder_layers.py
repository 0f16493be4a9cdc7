"""Layers of decoder language models: normalisation, rotary positions, attention, the skeleton.

An architecture is a layer and its differences from the usual one: the windows that layers see, the
rotation of positions, the norms. All layers of a model run in one scan, so a difference between
them is an array with an entry per layer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.cache import KeyValues, LayerCache
from adamerge_jax.models.family import Family, attention_heads
from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    Linear,
    Outputs,
    Rematerialize,
    Stack,
    activation_of,
    attention,
    parameter,
    unit_mean_square,
    value,
)

MakeLayer = Callable[[Config], nnx.Module]
"""Makes one of a model's layers from its config."""

MakeNorm = Callable[[int, float], nnx.Module]
"""Makes a normalisation from a number of features and the epsilon under its root."""


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis in float32, then `weight`."""

    def __init__(self, features: int, epsilon: float):
        self.weight = parameter(features)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        # Rounded before the product with the weight, which is where Gemma's differs.
        normalised = unit_mean_square(x, self.epsilon).astype(x.dtype)
        return (normalised * value(self.weight)).astype(x.dtype)


def head_features(config: Config) -> int:
    """Returns the features of one head, which need not be the hidden size divided by the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings (Su et al., 2021): the angular speed of each pair of features.

    Attributes:
        features: Features of an attention head.
        theta: The base of the geometric series of wavelengths.
        factor: The factor by which wavelengths are longer than those that `theta` gives.
        band: The limits of the factor (Llama 3.1), or None if all wavelengths are stretched: those
            that fit less than `band[0]` times into the context of pretraining are, those that fit
            more than `band[1]` times are not, and in between the frequency is interpolated.
        context: The context of pretraining, in tokens; read only with a `band`.
    """

    features: int
    theta: float
    factor: float = 1.0
    band: tuple[float, float] | None = None
    context: int | None = None

    @classmethod
    def of(cls, config: Config, layer_type: str | None = None) -> "Rotary":
        """Reads a config's rotary positions, those of one type of layer where types differ.

        Raises:
            InputError: The config asks for another kind of scaling than `linear` and `llama3`.
        """
        settings = config.rope_parameters
        settings = settings[layer_type] if layer_type else settings
        kind = settings["rope_type"]
        supported = ("default", "linear", "llama3")
        if kind not in supported:
            raise InputError(
                f"config.json: rope_type {kind!r} is not supported; "
                f"supported are {', '.join(supported)}"
            )
        if settings.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                "config.json: partial_rotary_factor is "
                f"{settings['partial_rotary_factor']!r}; only heads that rotate whole are supported"
            )
        rotary = cls(head_features(config), settings["rope_theta"])
        if kind == "default":
            return rotary
        rotary = dataclasses.replace(rotary, factor=settings["factor"])
        if kind == "linear":
            return rotary
        return dataclasses.replace(
            rotary,
            band=(settings["low_freq_factor"], settings["high_freq_factor"]),
            context=settings["original_max_position_embeddings"],
        )

    def frequencies(self) -> Float[np.ndarray, " features/2"]:
        """Returns radians per position, computed in float32 as PyTorch does."""
        exponents = np.arange(0, self.features, 2, dtype=np.float32) / np.float32(self.features)
        fast = 1 / np.float32(self.theta) ** exponents
        slow = fast / np.float32(self.factor)
        if self.band is None:
            return slow
        low, high = self.band
        turns = self.context * fast / (2 * np.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - share) * slow + share * fast).astype(np.float32)

    def table(self, length: int) -> Float[Array, "2 T features/2"]:
        """Returns cosines and sines of the angles at positions 0 to `length - 1`."""
        positions = jnp.arange(length, dtype=jnp.float32)
        angles = positions[:, None] * self.frequencies()
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(
    x: Float[Array, "B T heads features"], table: Float[Array, "2 T features/2"]
) -> Float[Array, "B T heads features"]:
    """Turns each feature of the first half together with its partner in the second half."""
    cosine, sine = table.astype(x.dtype)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(turned, axis=-1)


class Attention(nnx.Module):
    """Causal self-attention in which neighbouring heads of queries may share keys and values.

    Args:
        config: The model's config: numbers of heads, and features of each.
        bias: Adds a bias to queries, keys and values.
        output_bias: Adds a bias to the output.
        norm: Normalises queries and keys head by head, or None.
        scale: As in `layers.attention`.
        soft_cap: As in `layers.attention`.
    """

    def __init__(
        self,
        config: Config,
        *,
        bias: bool = False,
        output_bias: bool = False,
        norm: MakeNorm | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
    ):
        width, features = config.hidden_size, head_features(config)
        self.heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(width, self.heads * features, bias=bias)
        self.k_proj = Linear(width, shared * features, bias=bias)
        self.v_proj = Linear(width, shared * features, bias=bias)
        self.o_proj = Linear(self.heads * features, width, bias=output_bias)
        self.features, self.scale, self.soft_cap = features, scale, soft_cap
        if norm is not None:
            self.q_norm = norm(features, config.rms_norm_eps)
            self.k_norm = norm(features, config.rms_norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        mask: Int[Array, "B T"],
        tables: Float[Array, "rotaries 2 T features/2"],
        window: Int[Array, ""],
        rotary: Int[Array, ""],
        cache: LayerCache | None = None,
    ) -> Float[Array, "B T H"]:
        """Attends to the tokens before each position.

        Args:
            x: The layer's input.
            mask: 1 for tokens, 0 for padding; with a cache for all of its places, `[B, S]`.
            tables: Cosines and sines of every rotation in the model, at the positions of `x`.
            window: The number of positions that each position sees, itself included.
            rotary: The index of this layer's table.
            cache: The keys and values of earlier tokens, to which those of `x` are added; None
                where `x` has all tokens.
        """
        query, key = self._by_head(self.q_proj(x)), self._by_head(self.k_proj(x))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, tables[rotary]), rotate(key, tables[rotary])
        key, values, positions = key.reshape(*x.shape[:2], -1), self.v_proj(x), None
        if cache is not None:
            positions = cache.positions(x.shape[1])
            key, values = cache.add(key, values)
        mixed = attention(
            query.reshape(*x.shape[:2], -1),
            key,
            values,
            self.heads,
            window_bias(mask, window, positions),
            scale=self.scale,
            soft_cap=self.soft_cap,
        )
        return self.o_proj(mixed)

    def _by_head(self, x: Float[Array, "B T width"]) -> Float[Array, "B T heads features"]:
        return x.reshape(*x.shape[:2], -1, self.features)


def window_bias(
    mask: Int[Array, "B S"], window: Int[Array, ""], queries: Int[Array, " T"] | None = None
) -> Float[Array, "B 1 T S"]:
    """Returns zero at a position's last `window` tokens, elsewhere the lowest finite float32.

    A position is one of its own tokens. The lowest number is finite, so that the softmax of a
    position that sees no token, such as padding on the left, is defined.

    Args:
        mask: 1 for tokens, 0 for padding.
        window: The number of positions that each position sees, itself included.
        queries: The positions that see; by default all S.
    """
    positions = jnp.arange(mask.shape[1])
    back = (positions if queries is None else queries)[:, None] - positions
    seen = (back >= 0) & (back < window) & (mask[:, None, None, :] > 0)
    return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, 2020)."""

    def __init__(self, config: Config, activation: str, *, bias: bool = False):
        width, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, intermediate, bias=bias)
        self.up_proj = Linear(width, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, width, bias=bias)
        self.activation = activation_of(activation)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class PreNormLayer(nnx.Module):
    """The usual layer: attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: Config, attention: Attention, *, mlp_bias: bool = False):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, config.hidden_act, bias=mlp_bias)

    def __call__(self, x: Float[Array, "B T H"], *positions: Array) -> Float[Array, "B T H"]:
        """Runs the layer; `positions` are the further arguments of `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), *positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Embeddings, layers and the last normalisation; the parameters under `model.`."""

    def __init__(
        self,
        config: Config,
        rematerialize: Rematerialize,
        layer: MakeLayer,
        windows: Sequence[int | None],
        rotaries: Sequence[Rotary],
        norm: MakeNorm,
        embedding_scale: float,
    ):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = Stack(lambda: layer(config), config.num_hidden_layers, rematerialize)
        self.norm = norm(config.hidden_size, config.rms_norm_eps)
        self.windows, self.rotaries = tuple(windows), tuple(rotaries)
        self.embedding_scale = embedding_scale
        self.longest = config.max_position_embeddings

    def __call__(
        self,
        inputs: Mapping[str, Int[Array, "B T"]],
        hidden_states: bool,
        cache: KeyValues | None = None,
    ) -> Outputs:
        token_ids, mask, _ = text_inputs(inputs, self.longest)
        length = mask.shape[1]
        embedded = self.embed_tokens(token_ids)
        embedded = embedded * jnp.asarray(self.embedding_scale, embedded.dtype)

        rotaries = list(dict.fromkeys(self.rotaries))
        tables = jnp.stack([rotary.table(length) for rotary in rotaries])
        windows = jnp.array([window or length for window in self.windows])
        table_of_layer = jnp.array([rotaries.index(rotary) for rotary in self.rotaries])

        if cache is not None:
            read = jax.lax.dynamic_slice_in_dim(tables, cache.filled, token_ids.shape[1], axis=2)
            last, cache = self.layers.continued(
                embedded, cache, mask, read, per_layer=(windows, table_of_layer)
            )
            return Outputs(None, self.norm(last), None, cache)
        last, states = self.layers(
            embedded, mask, tables, per_layer=(windows, table_of_layer), hidden_states=hidden_states
        )
        last = self.norm(last)
        # As in `transformers`, the last state is the one after the norm.
        return Outputs(None, last, states.at[-1].set(last) if hidden_states else None)


class DecoderBackbone(nnx.Module):
    """A whole decoder language model: all of it is merged. Arguments as for `decoder_family`."""

    def __init__(
        self,
        config: Config,
        rematerialize: Rematerialize,
        *,
        layer: MakeLayer,
        windows: Callable[[Config], Sequence[int | None]],
        rotaries: Callable[[Config], Sequence[Rotary]],
        norm: MakeNorm,
        embedding_scale: Callable[[Config], float],
    ):
        _require_causal(config)
        self.model = Decoder(
            config,
            rematerialize,
            layer,
            windows(config),
            rotaries(config),
            norm,
            embedding_scale(config),
        )
        if not config.tie_word_embeddings:
            # Read by the head, which is given the backbone's parameters.
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        inputs: Mapping[str, Int[Array, "B T"]],
        hidden_states: bool = False,
        cache: KeyValues | None = None,
    ) -> Outputs:
        """Runs the model.

        Args:
            inputs: `input_ids` and optionally `attention_mask`; with a cache that is for all of
                its places, `[B, S]`.
            hidden_states: Whether to return every layer's output; not with a cache.
            cache: The keys and values of the tokens before these.
        """
        return self.model(inputs, hidden_states, cache)


class TiedOutput(nnx.Module):
    """The embeddings' matrix as an output layer."""

    def __init__(self, config: Config):
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size, bias=False)


class CausalHead(nnx.Module):
    """Logits of the next token, in float32, by a parameter of the backbone."""

    def __init__(self, config: Config):
        if config.tie_word_embeddings:
            self.model = TiedOutput(config)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, outputs: Outputs) -> Float[Array, "B T V"]:
        output = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens
        return output(outputs.last_hidden_state).astype(jnp.float32)


def windows_by_type(config: Config) -> list[int | None]:
    """Returns the number of tokens that each layer sees: `sliding_window`, or None for all.

    Raises:
        InputError: A layer is of another type, or there is no window for those that slide.
    """
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    for kind in config.layer_types:
        if kind not in windows:
            raise InputError(
                f"config.json: layer_types has {kind!r}, which is not supported; "
                f"supported are {', '.join(windows)}"
            )
    if config.sliding_window is None and "sliding_attention" in config.layer_types:
        raise InputError(
            "config.json: layer_types has 'sliding_attention', but there is no sliding_window"
        )
    return [windows[kind] for kind in config.layer_types]


def decoder_family(
    layer: MakeLayer,
    *,
    windows: Callable[[Config], Sequence[int | None]] = lambda config: (
        [None] * config.num_hidden_layers
    ),
    rotaries: Callable[[Config], Sequence[Rotary]] = lambda config: (
        [Rotary.of(config)] * config.num_hidden_layers
    ),
    norm: MakeNorm = RMSNorm,
    embedding_scale: Callable[[Config], float] = lambda config: 1.0,
    head: Callable[[Config], nnx.Module] = CausalHead,
) -> Family:
    """Returns the family of a decoder language model.

    Args:
        layer: Makes a layer; it is called with its input and the other arguments of `Attention`.
        windows: The number of tokens that each layer sees, None for all; by default all see all.
        rotaries: The rotation of each layer; by default the config's one for all.
        norm: Makes the last normalisation.
        embedding_scale: The factor of the embeddings.
        head: Makes the output layer.
    """
    backbone = partial(
        DecoderBackbone,
        layer=layer,
        windows=windows,
        rotaries=rotaries,
        norm=norm,
        embedding_scale=embedding_scale,
    )
    return Family(
        backbone=backbone,
        head=head,
        prefixes=("model.",),
        inputs=("input_ids", "attention_mask"),
        max_tokens=lambda config: config.max_position_embeddings,
        heads=attention_heads(
            "*.self_attn.q_proj.*",
            "*.self_attn.k_proj.*",
            "*.self_attn.v_proj.*",
            "*.self_attn.o_proj.weight",
        ),
        auto_class="AutoModelForCausalLM",
        ignored=_ignored_tensors,
        language=True,
        last_layer=None,
        cached_features=lambda config: config.num_key_value_heads * head_features(config),
    )


def _ignored_tensors(config: Config) -> tuple[str, ...]:
    """Returns name patterns of tensors in a checkpoint that are no parameters of their own."""
    computed = ("*.position_ids", "*.rotary_emb.inv_freq")
    return (*computed, "lm_head.weight") if config.tie_word_embeddings else computed


def _require_causal(config: Config) -> None:
    """Refuses configs whose tokens see later ones, as those of embedding models do."""
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        raise InputError(
            "config.json: attention is bidirectional (is_causal, use_bidirectional_attention); "
            "only causal language models are supported"
        )
