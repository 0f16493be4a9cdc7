"""MPNet (Song et al., 2020) with heads on texts and on tokens, as `transformers` builds it.

BERT's layers without its pooler, with RoBERTa's positions and head. All layers add one bias to
their scores of attention, which depends on the distance of two tokens as T5's does.
"""

from collections.abc import Mapping
from functools import partial

from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.bert import Encoder, PooledHead
from adamerge_jax.models.distilbert import Embeddings
from adamerge_jax.models.family import Family, HeadForm, attention_heads
from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Outputs,
    Prefixed,
    Rematerialize,
    TokenHead,
    attention,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.relative_positions import relative_bias
from adamerge_jax.models.roberta import OUT_PROJ, TwoLayerHead, positions_of
from adamerge_jax.models.token_rows import TokenRows, encode, token_rows

# `transformers` reads none of them from a config.
_PADDING = 1
_BUCKETS = 32
_FURTHEST = 128


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        self.q = Linear(config.hidden_size, config.hidden_size)
        self.k = Linear(config.hidden_size, config.hidden_size)
        self.v = Linear(config.hidden_size, config.hidden_size)
        self.o = Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B heads T T"]
    ) -> Float[Array, "B T H"]:
        return self.o(attention(self.q(x), self.k(x), self.v(x), self.heads, bias))


class Attention(nnx.Module):
    def __init__(self, config: Config):
        self.attn = SelfAttention(config)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B heads T T"]
    ) -> Float[Array, "B T H"]:
        return self.LayerNorm(self.attn(x, bias) + x)


class BiasedEncoder(Encoder):
    """BERT's encoder with the bias that all of its layers add to their scores of attention."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        _require_buckets(config)
        super().__init__(config, rematerialize, Attention)
        self.relative_attention_bias = Embedding(_BUCKETS, config.num_attention_heads)

    def position_bias(self, rows: TokenRows, longest: int) -> Float[Array, "*#R heads L L"]:
        """Returns the bias of texts of at most so many tokens."""
        return relative_bias(
            self.relative_attention_bias,
            rows.positions,
            longest,
            buckets=_BUCKETS,
            furthest=_FURTHEST,
            bidirectional=True,
        )


class MPNet(nnx.Module):
    """Embeddings and encoder; the parameters under `mpnet.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config, config.hidden_size, config.layer_norm_eps)
        self.encoder = BiasedEncoder(config, rematerialize)
        self.longest = _max_tokens(config)

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        token_ids, mask, _ = text_inputs(inputs, self.longest)
        rows = token_rows(inputs, mask)
        positions = positions_of(token_ids, _PADDING)
        embedded = self.embeddings(rows.in_rows(token_ids), rows.in_rows(positions))
        bias = self.encoder.position_bias(rows, token_ids.shape[1])
        return encode(self.encoder.layer, embedded, rows, hidden_states, position_bias=bias)


def _require_buckets(config: Config) -> None:
    """Refuses configs with another number of buckets, which `transformers` does not read."""
    count = config.relative_attention_num_buckets
    if count != _BUCKETS:
        raise InputError(
            f"config.json: relative_attention_num_buckets is {count}; supported is {_BUCKETS}, "
            "the number by which `transformers` computes the buckets of every MPNet"
        )


def _max_tokens(config: Config) -> int:
    # The first positions, up to that of padding, are never those of a token.
    return config.max_position_embeddings - _PADDING - 1


FAMILY = Family(
    backbone=partial(Prefixed, "mpnet", MPNet),
    head=TwoLayerHead,
    prefixes=("mpnet.",),
    second_names_of_tables={"mpnet.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",)},
    inputs=("input_ids", "attention_mask"),
    max_tokens=_max_tokens,
    packs=True,
    heads=attention_heads(
        "*.attention.attn.q.*",
        "*.attention.attn.k.*",
        "*.attention.attn.v.*",
        "*.attention.attn.o.weight",
    ),
    auto_class="AutoModelForSequenceClassification",
    last_layer=OUT_PROJ,
    # Bases have it, of experts only those of multiple choice.
    ignored_in_experts=("mpnet.pooler.*",),
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(TokenHead),
        MULTIPLE_CHOICE: HeadForm(partial(PooledHead, prefix="mpnet", outputs=1)),
    },
)
