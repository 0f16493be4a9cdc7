"""T5 (Raffel et al., 2020) for conditional generation, as `transformers` builds it.

Version 1.0 has ReLU and one matrix for embeddings and logits; version 1.1 and Flan-T5 have a gated
GELU and an output layer of their own.

Padding may be on either side: positions are relative.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adamerge_jax.models.family import Family, attention_heads
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
from adamerge_jax.models.relative_positions import relative_bias

_TABLE = "shared.weight"

_TABLE_TOO = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Other names of the table of embeddings."""

_UNUSED = (
    *_TABLE_TOO,
    # The first checkpoints of version 1.0 have it, no implementation reads it.
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def has_tied_head(config: Config) -> bool:
    """Tells a model whose output layer is the embeddings' matrix, its input times `d_model**-0.5`.

    The field `tie_word_embeddings` of a config.json becomes `scale_decoder_outputs` in memory:
    `transformers` 5 sets `tie_word_embeddings` to true for every T5.
    """
    return config.scale_decoder_outputs


def ignored_tensors(config: Config) -> tuple[str, ...]:
    """Returns the names of tensors in a checkpoint that are no parameters of their own."""
    return (*_UNUSED, "lm_head.weight") if has_tied_head(config) else _UNUSED


class RmsNorm(nnx.Module):
    """Division by the root mean square over the last axis, computed in float32.

    The result has the weight's dtype, which the residual stream does not always have.
    """

    def __init__(self, config: Config):
        self.weight = parameter(config.d_model)
        self.epsilon = config.layer_norm_epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        weight = value(self.weight)
        return (unit_mean_square(x, self.epsilon) * weight).astype(weight.dtype)


class Attention(nnx.Module):
    def __init__(self, config: Config):
        # Heads need not fill the hidden size, nor fit into it.
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        self.heads = config.num_heads

    def __call__(
        self,
        x: Float[Array, "B T H"],
        source: Float[Array, "B S H"],
        mask: Bool[Array, "#B 1 #T S"],
        bias: Float[Array, "1 heads T S"] | None = None,
    ) -> Float[Array, "B T H"]:
        # A query whose mask is empty attends to all values alike.
        seen = jnp.where(mask, 0.0 if bias is None else bias, jnp.finfo(jnp.float32).min)
        mixed = attention(self.q(x), self.k(source), self.v(source), self.heads, seen, scale=1.0)
        return self.o(mixed)


class FeedForward(nnx.Module):
    wi: Linear
    wi_0: Linear
    wi_1: Linear

    def __init__(self, config: Config):
        names = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        for name in names:
            setattr(self, name, Linear(config.d_model, config.d_ff, bias=False))
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.gated = config.is_gated_act
        self.activation = activation_of(config.dense_act_fn)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        if self.gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class SelfAttentionLayer(nnx.Module):
    def __init__(self, config: Config):
        self.SelfAttention = Attention(config)
        self.layer_norm = RmsNorm(config)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        mask: Bool[Array, "#B 1 #T T"],
        bias: Float[Array, "1 heads T T"],
    ) -> Float[Array, "B T H"]:
        normalised = self.layer_norm(x)
        return x + self.SelfAttention(normalised, normalised, mask, bias).astype(x.dtype)


class CrossAttentionLayer(nnx.Module):
    def __init__(self, config: Config):
        self.EncDecAttention = Attention(config)
        self.layer_norm = RmsNorm(config)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        encoded: Float[Array, "B S H"],
        mask: Bool[Array, "B 1 1 S"],
    ) -> Float[Array, "B T H"]:
        return x + self.EncDecAttention(self.layer_norm(x), encoded, mask).astype(x.dtype)


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: Config):
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RmsNorm(config)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return x + self.DenseReluDense(self.layer_norm(x)).astype(x.dtype)


class EncoderBlock(nnx.Module):
    def __init__(self, config: Config):
        self.layer = nnx.Dict({"0": SelfAttentionLayer(config), "1": FeedForwardLayer(config)})

    def __call__(
        self,
        x: Float[Array, "B T H"],
        mask: Bool[Array, "#B 1 #T T"],
        bias: Float[Array, "1 heads T T"],
    ) -> Float[Array, "B T H"]:
        return self.layer["1"](self.layer["0"](x, mask, bias))


class DecoderBlock(nnx.Module):
    def __init__(self, config: Config):
        self.layer = nnx.Dict(
            {
                "0": SelfAttentionLayer(config),
                "1": CrossAttentionLayer(config),
                "2": FeedForwardLayer(config),
            }
        )

    def __call__(
        self,
        x: Float[Array, "B T H"],
        mask: Bool[Array, "#B 1 #T T"],
        bias: Float[Array, "1 heads T T"],
        encoded: Float[Array, "B S H"],
        encoded_mask: Bool[Array, "B 1 1 S"],
    ) -> Float[Array, "B T H"]:
        x = self.layer["0"](x, mask, bias)
        return self.layer["2"](self.layer["1"](x, encoded, encoded_mask))


class SelfAttentionBias(nnx.Module):
    def __init__(self, config: Config):
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )


class SelfAttentionBiasLayer(nnx.Module):
    def __init__(self, config: Config):
        self.SelfAttention = SelfAttentionBias(config)


class BlockBias(nnx.Module):
    """The position bias: a parameter of block 0 alone, added by all blocks."""

    def __init__(self, config: Config):
        self.layer = nnx.Dict({"0": SelfAttentionBiasLayer(config)})


class Blocks(Stack):
    """Stacked blocks, and at the attribute `0` the position bias, which is not stacked."""

    def __init__(
        self,
        block: type[EncoderBlock] | type[DecoderBlock],
        config: Config,
        length: int,
        rematerialize: Rematerialize,
    ):
        super().__init__(lambda: block(config), length, rematerialize)
        setattr(self, "0", BlockBias(config))
        self.buckets = config.relative_attention_num_buckets
        self.furthest = config.relative_attention_max_distance
        self.bidirectional = block is EncoderBlock

    def position_bias(self, length: int) -> Float[Array, "1 heads T T"]:
        """Returns the term that is added to the scores of self-attention, in float32."""
        bias = relative_bias(
            getattr(self, "0").layer["0"].SelfAttention.relative_attention_bias,
            jnp.arange(length),
            length,
            buckets=self.buckets,
            furthest=self.furthest,
            bidirectional=self.bidirectional,
        )
        return bias[None]


class Tower(nnx.Module):
    """Encoder or decoder: the blocks and the norm after them."""

    def __init__(
        self,
        block: type[EncoderBlock] | type[DecoderBlock],
        config: Config,
        length: int,
        rematerialize: Rematerialize,
    ):
        self.block = Blocks(block, config, length, rematerialize)
        self.final_layer_norm = RmsNorm(config)

    def __call__(
        self,
        embedded: Float[Array, "B T H"],
        mask: Bool[Array, "#B 1 #T T"],
        *source: Array,
        hidden_states: bool,
    ) -> Outputs:
        """Runs the blocks.

        Args:
            embedded: The embedded tokens.
            mask: True for the keys that a query attends to.
            *source: For a decoder, the encoder's output `[B, S, H]` and its mask `[B, 1, 1, S]`.
            hidden_states: Whether to return every block's output, the last one after the norm.
        """
        # The sums of large T5 models exceed what float16 can hold.
        stream = embedded.astype(jnp.float32) if embedded.dtype == jnp.float16 else embedded
        bias = self.block.position_bias(embedded.shape[1])
        last, states = self.block(stream, mask, bias, *source, hidden_states=hidden_states)
        last = self.final_layer_norm(last)
        return Outputs(None, last, None if states is None else states.at[-1].set(last))


class T5Backbone(nnx.Module):
    """A whole `T5ForConditionalGeneration`: all of it is merged, the output layer included."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Tower(EncoderBlock, config, config.num_layers, rematerialize)
        self.decoder = Tower(DecoderBlock, config, config.num_decoder_layers, rematerialize)
        if not has_tied_head(config):
            # Read by the head only, but shared by all tasks.
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)

    def __call__(
        self, inputs: Mapping[str, Int[Array, "B _"]], hidden_states: bool = False
    ) -> Outputs:
        """Encodes a batch and decodes the given beginnings of its continuations.

        Args:
            inputs: For the encoder `input_ids` and optionally `attention_mask`, `[B, S]`; for the
                decoder `decoder_input_ids`, which begin with the config's
                `decoder_start_token_id`, and optionally `decoder_attention_mask`, `[B, T]`.
            hidden_states: Whether to return the decoder's states.

        Returns:
            The decoder's output after its last norm, and its states if asked for: embeddings and
            every layer's output, the last one after the norm.
        """
        encoded = self.encode(inputs).last_hidden_state
        token_ids = inputs["decoder_input_ids"]
        length = token_ids.shape[1]
        mask = jnp.tri(length, dtype=bool)[None, None]
        if "decoder_attention_mask" in inputs:
            mask = mask & _padding_mask(inputs["decoder_attention_mask"])
        return self.decoder(
            self.shared(token_ids),
            mask,
            encoded,
            _encoder_mask(inputs),
            hidden_states=hidden_states,
        )

    def encode(
        self, inputs: Mapping[str, Int[Array, "B _"]], hidden_states: bool = False
    ) -> Outputs:
        """Returns the encoder's outputs; its states end with the norm, as the decoder's do."""
        embedded = self.shared(inputs["input_ids"])
        return self.encoder(embedded, _encoder_mask(inputs), hidden_states=hidden_states)


class T5Head(nnx.Module):
    """The output layer of a `T5ForConditionalGeneration`, a parameter of the backbone."""

    def __init__(self, config: Config):
        self.name = "shared" if has_tied_head(config) else "lm_head"
        setattr(self, self.name, Linear(config.d_model, config.vocab_size, bias=False))
        self.scale = config.d_model**-0.5 if has_tied_head(config) else 1.0

    def __call__(self, outputs: Outputs) -> Float[Array, "B T V"]:
        """Returns the logits of the token after each position, float32."""
        return getattr(self, self.name)(outputs.last_hidden_state * self.scale).astype(jnp.float32)


def _padding_mask(attention_mask: Int[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    return attention_mask[:, None, None, :] > 0


def _encoder_mask(inputs: Mapping[str, Int[Array, "B _"]]) -> Bool[Array, "B 1 1 S"]:
    return _padding_mask(inputs.get("attention_mask", jnp.ones_like(inputs["input_ids"])))


FAMILY = Family(
    backbone=T5Backbone,
    head=T5Head,
    prefixes=(),
    inputs=("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
    max_tokens=lambda config: None,
    heads=attention_heads("*.q.weight", "*.k.weight", "*.v.weight", "*.o.weight"),
    auto_class="AutoModelForSeq2SeqLM",
    ignored=ignored_tensors,
    second_names_of_tables={_TABLE: _TABLE_TOO},
    language=True,
    last_layer=None,
)
