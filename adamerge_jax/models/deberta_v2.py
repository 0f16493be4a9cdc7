"""DeBERTa versions 2 and 3 (He et al., 2021) with heads on texts and on tokens, as `transformers`.

BERT's layers, with scores of attention that tokens and their relative positions give apart from
each other ("disentangled").
"""

import math
from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.bert import Attention, Layer, embedded_rows
from adamerge_jax.models.family import Family, HeadAxes, HeadForm, attention_heads
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Outputs,
    Prefixed,
    Rematerialize,
    Stack,
    TokenHead,
    activation_of,
    attention,
    value,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.token_rows import encode


def log_buckets(
    differences: Int[np.ndarray, " N"], count: int, furthest: int
) -> Int[np.ndarray, " N"]:
    """Returns the bucket of each difference of positions, which has its sign.

    Those up to half of `count` have a bucket each. Longer ones share buckets whose widths grow
    geometrically, so that `furthest - 1` is in the last one, `count - 1`.

    Args:
        differences: Position of the query less that of the key.
        count: The buckets of one sign, that of 0 included.
        furthest: The number of differences of one sign.
    """
    exact = count // 2
    # In float32, like PyTorch: where a bucket ends at an integer, rounding decides.
    octaves = np.log(np.maximum(np.abs(differences), 1).astype(np.float32) / np.float32(exact))
    share = octaves / np.log(np.float32((furthest - 1) / exact))
    shared = np.ceil(share * np.float32(exact - 1)).astype(np.int32) + exact
    return np.where(np.abs(differences) <= exact, differences, np.sign(differences) * shared)


def _furthest(config: Config) -> int:
    """Returns the number of differences of positions of one sign that a model tells apart."""
    count = getattr(config, "max_relative_positions", -1)
    return count if count >= 1 else config.max_position_embeddings


def _norms(config: Config) -> list[str]:
    """Returns the kinds of norms of the embeddings of relative positions: `none`, `layer_norm`."""
    return [name.strip() for name in getattr(config, "norm_rel_ebd", "none").lower().split("|")]


def pairs_by_distance(scores: Float[Array, "N L 2*L-1"]) -> Float[Array, "N L L"]:
    """Returns the score of each pair of slots, from those of each slot with each distance.

    Args:
        scores: Of each slot, those with the other slots from `L - 1` before to `L - 1` behind it.
    """
    count, length, _ = scores.shape
    # A row of the result begins one column before that of the row above it, so that all are at one
    # stride: a reshape. With each score looked up, a step of learning takes a fifth longer.
    flat = jnp.pad(scores, ((0, 0), (0, 0), (0, 1))).reshape(count, -1)
    rows = flat[:, length - 1 :][:, : length * (2 * length - 1)]
    return rows.reshape(count, length, -1)[..., :length]


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        width = config.hidden_size
        self.query_proj = Linear(width, width)
        self.key_proj = Linear(width, width)
        self.value_proj = Linear(width, width)
        self.heads = config.num_attention_heads
        self.kinds = tuple(kind for kind in ("c2p", "p2c") if kind in (config.pos_att_type or ()))
        self.scale = 1 / math.sqrt(width // self.heads * (1 + len(self.kinds)))
        if config.relative_attention and not getattr(config, "share_att_key", False):
            if "c2p" in self.kinds:
                self.pos_key_proj = Linear(width, width)
            if "p2c" in self.kinds:
                self.pos_query_proj = Linear(width, width)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        bias: Float[Array, "B 1 #T T"],
        positions: Float[Array, "2*T-1 H"] | None,
    ) -> Float[Array, "B T H"]:
        """Attends to all tokens of a text.

        Args:
            x: The layer's input.
            bias: The term of scores by which no token sees another text, or padding.
            positions: The embeddings of distances, None for a model without.
        """
        query, key = self.query_proj(x), self.key_proj(x)
        if positions is not None:
            if "c2p" in self.kinds:  # what a query's content seeks at the key's position
                keys = _projected(getattr(self, "pos_key_proj", self.key_proj), positions)
                bias = bias + self._scores(query, keys[::-1])
            if "p2c" in self.kinds:  # what a query's position seeks of the key's content
                queries = _projected(getattr(self, "pos_query_proj", self.query_proj), positions)
                bias = bias + self._scores(key, queries).swapaxes(2, 3)
        return attention(query, key, self.value_proj(x), self.heads, bias, scale=self.scale)

    def _scores(
        self, content: Float[Array, "B T H"], positions: Float[Array, "2*T-1 H"]
    ) -> Float[Array, "B heads T T"]:
        """Returns the scores of each token with the positions of the others."""
        batch, length, _ = content.shape
        by_head = content.reshape(batch, length, self.heads, -1)
        of_positions = positions.reshape(len(positions), self.heads, -1)
        scores = jnp.einsum(
            "bthd,phd->bhtp", by_head, of_positions, preferred_element_type=jnp.float32
        )
        pairs = pairs_by_distance(scores.reshape(-1, *scores.shape[2:])) * self.scale
        return pairs.reshape(batch, self.heads, length, length)


class Encoder(nnx.Module):
    """Layers, and the embeddings of relative positions that all of them share."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.layer = Stack(
            lambda: Layer(config, Attention(config, SelfAttention)),
            config.num_hidden_layers,
            rematerialize,
        )
        self.furthest = _furthest(config)
        self.buckets = getattr(config, "position_buckets", -1)
        self.span = self.buckets if self.buckets > 0 else self.furthest
        if config.relative_attention:
            self.rel_embeddings = Embedding(2 * self.span, config.hidden_size)
        if "layer_norm" in _norms(config):
            self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def relative_positions(self, length: int) -> Float[Array, "2*L-1 H"] | None:
        """Returns the embeddings of all distances in a row, the lowest one first; None without any.

        Args:
            length: The slots of a row.
        """
        if not hasattr(self, "rel_embeddings"):
            return None
        places = np.arange(1 - length, length)
        if self.buckets > 0:
            places = log_buckets(places, self.buckets, self.furthest)
        places = np.clip(places + self.span, 0, 2 * self.span - 1)
        embedded = self.rel_embeddings(jnp.asarray(places))
        return self.LayerNorm(embedded) if hasattr(self, "LayerNorm") else embedded


def _projected(layer: Linear, positions: Float[Array, "P H"]) -> Float[Array, "P H"]:
    """Applies a layer to what is no token: statistics of its inputs are to leave it out."""
    return positions @ value(layer.weight).T + value(layer.bias)


class Embeddings(nnx.Module):
    def __init__(self, config: Config):
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width)
        if config.position_biased_input:
            self.position_embeddings = Embedding(config.max_position_embeddings, width)
        if config.type_vocab_size > 0:
            self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        positions: Int[Array, "... T"],
    ) -> Float[Array, "B T H"]:
        embedded = self.word_embeddings(token_ids)
        if hasattr(self, "position_embeddings"):
            embedded = embedded + self.position_embeddings(positions)
        if hasattr(self, "token_type_embeddings"):
            embedded = embedded + self.token_type_embeddings(token_types)
        return self.LayerNorm(embedded)


class DebertaV2(nnx.Module):
    """Embeddings and encoder; the parameters under `deberta.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        if reason := _reason_not_to_run(config):
            raise InputError(f"config.json: {reason}")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, rematerialize)
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        embedded, rows = embedded_rows(self.embeddings, inputs, self.longest)
        positions = self.encoder.relative_positions(embedded.shape[1])
        return encode(self.encoder.layer, embedded, rows, hidden_states, positions)


def _reason_not_to_run(config: Config) -> str | None:
    """Returns what a config has that only the PyTorch forward computes; None if nothing."""
    width = config.hidden_size
    for name, size, usual in (
        ("conv_kernel_size", getattr(config, "conv_kernel_size", 0), 0),
        ("embedding_size", getattr(config, "embedding_size", width), width),
        ("pooler_hidden_size", config.pooler_hidden_size, width),
        ("attention_head_size", *_head_sizes(config)),
    ):
        if size != usual:
            return f"{name} is {size!r}; supported is {usual}"
    buckets, most = getattr(config, "position_buckets", -1), 2 * _furthest(config) - 3
    if buckets > 0 and not 2 <= buckets <= most:
        return f"position_buckets is {buckets}; supported are 2 to {most}"
    return None


def _head_sizes(config: Config) -> tuple[int, int]:
    """Returns the features of a head, and those that they usually are."""
    usual = config.hidden_size // config.num_attention_heads
    return getattr(config, "attention_head_size", usual), usual


class Pooler(nnx.Module):
    def __init__(self, config: Config):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = activation_of(config.pooler_hidden_act)

    def __call__(self, first: Float[Array, "B H"]) -> Float[Array, "B H"]:
        return self.activation(self.dense(first))


class Classifier(nnx.Module):
    """The part of a `DebertaV2ForSequenceClassification` that each task keeps."""

    def __init__(self, config: Config, outputs: int | None = None):
        """Makes the layers, the last with so many outputs in place of one for each class."""
        self.pooler = Pooler(config)
        self.classifier = Linear(config.hidden_size, outputs or config.num_labels)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        assert outputs.pooled is not None  # by `DebertaV2`
        return self.classifier(self.pooler(outputs.pooled))


_CONTENT_HEADS = attention_heads(
    "*.attention.self.query_proj.*",
    "*.attention.self.key_proj.*",
    "*.attention.self.value_proj.*",
    "*.attention.output.dense.weight",
)


def _heads(config: Config) -> HeadAxes:
    rows = 0, config.num_attention_heads
    return {**_CONTENT_HEADS(config), "*.pos_key_proj.*": rows, "*.pos_query_proj.*": rows}


def _ignored(config: Config) -> tuple[str, ...]:
    """Returns the patterns of tensors that are no parameters: old files have unused positions."""
    computed = ("*.position_ids",)
    return computed if config.position_biased_input else (*computed, "*.position_embeddings.*")


FAMILY = Family(
    backbone=partial(Prefixed, "deberta", DebertaV2),
    head=Classifier,
    prefixes=("deberta.",),
    second_names_of_tables={
        "deberta.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",)
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_tokens=lambda config: config.max_position_embeddings,
    packs=True,
    heads=_heads,
    ignored=_ignored,
    auto_class="AutoModelForSequenceClassification",
    # The heads of pretraining, with which a sentence embedder may have been saved.
    ignored_in_experts=("lm_predictions.*", "mask_predictions.*"),
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(TokenHead),
        MULTIPLE_CHOICE: HeadForm(partial(Classifier, outputs=1)),
    },
    runs=lambda config: _reason_not_to_run(config) is None,
)
