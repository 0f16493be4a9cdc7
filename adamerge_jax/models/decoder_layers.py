"""Layers of decoder language models: normalisation, rotary positions, attention, the skeleton.

An architecture is a layer and its differences from the usual one: the windows that layers see, the
rotation of positions, the norms. All layers of a model run in one scan, so a difference between
them is an array with an entry per layer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.cache import KeyValues, LayerCache
from adamerge_jax.models.family import Family, HeadAxes, attention_heads
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
from adamerge_jax.models.rotary import Rotary, head_features

MakeLayer = Callable[[Config], nnx.Module]
"""Makes one of a model's layers from its config."""

MakeNorm = Callable[..., nnx.Module]
"""Makes a normalisation from a number of features and the epsilon under its root."""

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
"""Names of the epsilon of norms in configs; an architecture has one of them."""


def norm_epsilon(config: Config) -> float:
    """Returns the epsilon under the root of a model's norms."""
    return next(getattr(config, name) for name in EPSILONS if hasattr(config, name))


class Names(NamedTuple):
    """The names that a checkpoint has for the parts of a decoder.

    Attributes:
        body: All but the output layer.
        table: The embeddings, in the body.
        norm: The last normalisation, in the body.
        output: The output layer.
    """

    body: str = "model"
    table: str = "embed_tokens"
    norm: str = "norm"
    output: str = "lm_head"


NAMES = Names()
"""The usual names."""


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis in float32, then `weight`."""

    def __init__(self, features: int, epsilon: float):
        self.weight = parameter(features)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        # Rounded before the product with the weight, which is where Gemma's differs.
        normalised = unit_mean_square(x, self.epsilon).astype(x.dtype)
        return (normalised * value(self.weight)).astype(x.dtype)


class CentredNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, without a bias.

    Args:
        features: The features, or the heads and the features of each.
        epsilon: The number under the root.
    """

    def __init__(self, features: int | tuple[int, int], epsilon: float):
        self.weight = parameter(*(features if isinstance(features, tuple) else (features,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        weight = value(self.weight).astype(jnp.float32)
        return (unit_mean_square(centred, self.epsilon) * weight).astype(x.dtype)


def rotate(
    x: Float[Array, "B T heads features"],
    table: Float[Array, "2 *B T turning/2"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T heads features"]:
    """Turns pairs of features; those behind the ones that the table is for stay.

    Args:
        x: Queries or keys.
        table: Cosines and sines of each pair, by position; of one text where all have the same.
        interleaved: The pairs are neighbours, and are turned in float32; else a feature of the
            first half is a pair with its partner in the second half.
    """
    turning = 2 * table.shape[-1]
    if interleaved:
        cosine, sine = table[..., None, :]
        pairs = x[..., :turning].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        rotated = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], turning).astype(x.dtype)
    else:
        cosine, sine = table.astype(x.dtype)[..., None, :]
        first, second = jnp.split(x[..., :turning], 2, axis=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        rotated = jnp.concatenate(turned, axis=-1)
    if turning == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., turning:]], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention in which neighbouring heads of queries may share keys and values.

    Args:
        config: The model's config: numbers of heads, and features of each.
        bias: Adds a bias to queries, keys and values.
        output_bias: Adds a bias to the output.
        norm: Normalises queries and keys, or None.
        norm_of: The features that are normalised together: those of a `head`, those of all heads
            (`projection`), or those of a head by weights of its own (`each_head`).
        interleaved: As in `rotate`.
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
        norm_of: Literal["head", "projection", "each_head"] = "head",
        interleaved: bool = False,
        scale: float | None = None,
        soft_cap: float | None = None,
    ):
        self.heads, self.features = config.num_attention_heads, head_features(config)
        self.shared = getattr(config, "num_key_value_heads", None) or self.heads
        self.scale, self.soft_cap, self.interleaved = scale, soft_cap, interleaved
        self.make_projections(config.hidden_size, bias, output_bias)
        self.norm_of = norm_of
        if norm is not None:
            epsilon = norm_epsilon(config)

            def features_of(heads: int) -> int | tuple[int, int]:
                by_name = {
                    "head": self.features,
                    "projection": heads * self.features,
                    "each_head": (heads, self.features),
                }
                return by_name[norm_of]

            self.q_norm = norm(features_of(self.heads), epsilon)
            self.k_norm = norm(features_of(self.shared), epsilon)

    def make_projections(self, width: int, bias: bool, output_bias: bool) -> None:
        """Makes the projections, by the names that a checkpoint has for them."""
        self.q_proj = Linear(width, self.heads * self.features, bias=bias)
        self.k_proj = Linear(width, self.shared * self.features, bias=bias)
        self.v_proj = Linear(width, self.shared * self.features, bias=bias)
        self.o_proj = Linear(self.heads * self.features, width, bias=output_bias)

    def project(
        self, x: Float[Array, "B T H"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T shared"], Float[Array, "B T shared"]]:
        """Returns queries, keys and values."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def project_back(self, mixed: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """Returns the output of the mixed values."""
        return self.o_proj(mixed)

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
        query, key, values = self.project(x)
        if hasattr(self, "q_norm") and self.norm_of == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self._by_head(query), self._by_head(key)
        if hasattr(self, "q_norm") and self.norm_of != "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, tables[rotary], interleaved=self.interleaved)
        key = rotate(key, tables[rotary], interleaved=self.interleaved)
        key, positions = key.reshape(*x.shape[:2], -1), None
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
        return self.project_back(mixed)

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

    def __init__(
        self,
        config: Config,
        activation: str,
        *,
        bias: bool = False,
        intermediate: int | None = None,
    ):
        width, intermediate = config.hidden_size, intermediate or config.intermediate_size
        self.gate_proj = Linear(width, intermediate, bias=bias)
        self.up_proj = Linear(width, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, width, bias=bias)
        self.activation = activation_of(activation)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class FusedAttention(Attention):
    """Attention whose queries, keys and values are one projection (Phi-3).

    All heads of queries come first, then those of keys and those of values.
    """

    def make_projections(self, width: int, bias: bool, output_bias: bool) -> None:
        heads = self.heads + 2 * self.shared
        self.qkv_proj = Linear(width, heads * self.features, bias=bias)
        self.o_proj = Linear(self.heads * self.features, width, bias=output_bias)

    def project(
        self, x: Float[Array, "B T H"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T shared"], Float[Array, "B T shared"]]:
        queries, keys = self.heads * self.features, self.shared * self.features
        query, key, values = jnp.split(self.qkv_proj(x), [queries, queries + keys], axis=-1)
        return query, key, values


class FusedGatedMLP(nnx.Module):
    """A `GatedMLP` whose gate and `up` are one projection, the gate first."""

    def __init__(self, config: Config):
        width, intermediate = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(width, 2 * intermediate, bias=False)
        self.down_proj = Linear(intermediate, width, bias=False)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(self.activation(gate) * up)


class PreNormLayer(nnx.Module):
    """The usual layer: attention and MLP, each normalised before and added to its input.

    Args:
        config: The model's config.
        attention: The layer's attention.
        mlp: What comes behind it; a `GatedMLP` if None.
        mlp_bias: Adds biases to that one.
        norm: Makes the normalisations.
        parallel: The MLP reads the layer's input as attention does: `separate` through a norm of
            its own, `shared` through that of attention. None where it reads attention's output.
        residual: The factor of what attention and MLP add.

    Attributes:
        attention_name: The name that a checkpoint has for attention.
        mlp_name: The name that it has for the MLP.
    """

    attention_name = "self_attn"
    mlp_name = "mlp"

    def __init__(
        self,
        config: Config,
        attention: nnx.Module,
        *,
        mlp: nnx.Module | None = None,
        mlp_bias: bool = False,
        norm: MakeNorm = RMSNorm,
        parallel: Literal["separate", "shared"] | None = None,
        residual: float = 1.0,
    ):
        self.input_layernorm = norm(config.hidden_size, norm_epsilon(config))
        setattr(self, self.attention_name, attention)
        if parallel != "shared":
            self.post_attention_layernorm = norm(config.hidden_size, norm_epsilon(config))
        mlp = mlp or GatedMLP(config, config.hidden_act, bias=mlp_bias)
        setattr(self, self.mlp_name, mlp)
        self.parallel, self.residual = parallel, residual

    def __call__(self, x: Float[Array, "B T H"], *positions: Array) -> Float[Array, "B T H"]:
        """Runs the layer; `positions` are the further arguments of `Attention`."""
        normalised = self.input_layernorm(x)
        attention, mlp = getattr(self, self.attention_name), getattr(self, self.mlp_name)
        attended = x + self._scaled(attention(normalised, *positions))
        if self.parallel == "shared":
            return attended + self._scaled(mlp(normalised))
        read = x if self.parallel else attended
        return attended + self._scaled(mlp(self.post_attention_layernorm(read)))

    def _scaled(self, added: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return added if self.residual == 1.0 else added * jnp.asarray(self.residual, added.dtype)


class PostNormLayer(nnx.Module):
    """Attention and MLP, the output of each normalised and then added to its input (OLMo 2)."""

    def __init__(self, config: Config, attention: Attention):
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, norm_epsilon(config))
        self.mlp = GatedMLP(config, config.hidden_act)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, norm_epsilon(config))

    def __call__(self, x: Float[Array, "B T H"], *positions: Array) -> Float[Array, "B T H"]:
        x = x + self.post_attention_layernorm(self.self_attn(x, *positions))
        return x + self.post_feedforward_layernorm(self.mlp(x))


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
        names: Names,
    ):
        setattr(self, names.table, Embedding(config.vocab_size, config.hidden_size))
        self.layers = Stack(lambda: layer(config), config.num_hidden_layers, rematerialize)
        setattr(self, names.norm, norm(config.hidden_size, norm_epsilon(config)))
        self.names = names
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
        embedded = getattr(self, self.names.table)(token_ids)
        norm = getattr(self, self.names.norm)
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
            return Outputs(None, norm(last), None, cache)
        last, states = self.layers(
            embedded, mask, tables, per_layer=(windows, table_of_layer), hidden_states=hidden_states
        )
        last = norm(last)
        # As in `transformers`, the last state is the one after the norm.
        return Outputs(None, last, states.at[-1].set(last) if hidden_states else None)


class DecoderBackbone(nnx.Module):
    """A whole decoder language model: all of it is merged. Arguments as for `decoder_family`.

    One that does not write has no output layer.
    """

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
        names: Names,
        writes: bool = True,
    ):
        _require_causal(config)
        decoder = Decoder(
            config,
            rematerialize,
            layer,
            windows(config),
            rotaries(config),
            norm,
            embedding_scale(config),
            names,
        )
        setattr(self, names.body, decoder)
        self.body = names.body
        if writes and not config.tie_word_embeddings:
            # Read by the head, which is given the backbone's parameters.
            output = Linear(config.hidden_size, config.vocab_size, bias=False)
            setattr(self, names.output, output)

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
        return getattr(self, self.body)(inputs, hidden_states, cache)


class TiedOutput(nnx.Module):
    """The embeddings' matrix as an output layer, under the name of the embeddings."""

    def __init__(self, config: Config, name: str):
        setattr(self, name, Linear(config.hidden_size, config.vocab_size, bias=False))


class CausalHead(nnx.Module):
    """Logits of the next token, in float32, by a parameter of the backbone."""

    def __init__(self, config: Config, names: Names = NAMES):
        if config.tie_word_embeddings:
            self.path = names.body, names.table
            setattr(self, names.body, TiedOutput(config, names.table))
        else:
            self.path = (names.output,)
            output = Linear(config.hidden_size, config.vocab_size, bias=False)
            setattr(self, names.output, output)

    def __call__(self, outputs: Outputs) -> Float[Array, "B T V"]:
        output = reduce(getattr, self.path, self)
        return output(outputs.last_hidden_state).astype(jnp.float32)


def scaled_head(factor: Callable[[Config], float]) -> Callable[[Config], CausalHead]:
    """Returns the class of heads whose logits have a factor, from the config."""

    class ScaledHead(CausalHead):
        def __init__(self, config: Config):
            super().__init__(config)
            self.factor = factor(config)

        def __call__(self, outputs: Outputs) -> Float[Array, "B T V"]:
            return super().__call__(outputs) * self.factor

    return ScaledHead


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


HEADS = attention_heads(
    "*.self_attn.q_proj.*",
    "*.self_attn.k_proj.*",
    "*.self_attn.v_proj.*",
    "*.self_attn.o_proj.weight",
)
"""The heads of `Attention`."""


def fused_heads(config: Config) -> HeadAxes:
    """Returns the heads of `FusedAttention`, of which each is one of queries, keys or values."""
    heads = config.num_attention_heads
    return {
        "*.self_attn.qkv_proj.*": (0, heads + 2 * config.num_key_value_heads),
        "*.self_attn.o_proj.weight": (1, heads),
    }


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
    head: Callable[[Config], nnx.Module] | None = None,
    heads: Callable[[Config], HeadAxes] = HEADS,
    names: Names = NAMES,
    ignored: Sequence[str] = (),
) -> Family:
    """Returns the family of a decoder language model.

    Args:
        layer: Makes a layer; it is called with its input and the other arguments of `Attention`.
        windows: The number of tokens that each layer sees, None for all; by default all see all.
        rotaries: The rotation of each layer; by default the config's one for all.
        norm: Makes the last normalisation.
        embedding_scale: The factor of the embeddings.
        head: Makes the output layer; by default a `CausalHead`.
        heads: As in `Family`.
        names: The names of the parts.
        ignored: Further patterns of tensors in a checkpoint that are no parameters.
    """
    backbone = partial(
        DecoderBackbone,
        layer=layer,
        windows=windows,
        rotaries=rotaries,
        norm=norm,
        embedding_scale=embedding_scale,
        names=names,
    )
    return Family(
        backbone=backbone,
        head=head or partial(CausalHead, names=names),
        prefixes=(f"{names.body}.",),
        inputs=("input_ids", "attention_mask"),
        max_tokens=lambda config: config.max_position_embeddings,
        heads=heads,
        auto_class="AutoModelForCausalLM",
        ignored=lambda config: (*_ignored_tensors(config, names), *ignored),
        language=True,
        last_layer=None,
        cached_features=_cached_features,
        embedding_backbone=partial(backbone, writes=False),
        output_layer=f"{names.output}.weight",
    )


def _cached_features(config: Config) -> int:
    """Returns the features of a token's keys in one layer, all heads together."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads * head_features(config)


def _ignored_tensors(config: Config, names: Names) -> tuple[str, ...]:
    """Returns name patterns of tensors in a checkpoint that are no parameters of their own."""
    computed = ("*.position_ids", "*.rotary_emb.inv_freq")
    return (*computed, f"{names.output}.weight") if config.tie_word_embeddings else computed


def _require_causal(config: Config) -> None:
    """Refuses configs whose tokens see later ones, as those of embedding models do."""
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        raise InputError(
            "config.json: attention is bidirectional (is_causal, use_bidirectional_attention); "
            "only causal language models are supported"
        )
