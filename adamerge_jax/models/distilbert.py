"""DistilBERT (Sanh et al., 2019) with heads on texts and on tokens, as `transformers` builds it.

BERT's computation without types of tokens and without a pooler, under other names.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

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
    Stack,
    TokenHead,
    activation_of,
    attention,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.token_rows import encode, token_rows

_EPSILON = 1e-12


class Embeddings(nnx.Module):
    def __init__(self, config: Config, features: int, epsilon: float):
        self.word_embeddings = Embedding(config.vocab_size, features)
        self.position_embeddings = Embedding(config.max_position_embeddings, features)
        self.LayerNorm = LayerNorm(features, epsilon)

    def __call__(
        self, token_ids: Int[Array, "B T"], positions: Int[Array, "... T"]
    ) -> Float[Array, "B T H"]:
        embedded = self.word_embeddings(token_ids) + self.position_embeddings(positions)
        return self.LayerNorm(embedded)


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        self.q_lin = Linear(config.dim, config.dim)
        self.k_lin = Linear(config.dim, config.dim)
        self.v_lin = Linear(config.dim, config.dim)
        self.out_lin = Linear(config.dim, config.dim)
        self.heads = config.n_heads

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B 1 #T T"]
    ) -> Float[Array, "B T H"]:
        mixed = attention(self.q_lin(x), self.k_lin(x), self.v_lin(x), self.heads, bias)
        return self.out_lin(mixed)


class FeedForward(nnx.Module):
    def __init__(self, config: Config):
        self.lin1 = Linear(config.dim, config.hidden_dim)
        self.lin2 = Linear(config.hidden_dim, config.dim)
        self.activation = activation_of(config.activation)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.lin2(self.activation(self.lin1(x)))


class Layer(nnx.Module):
    def __init__(self, config: Config):
        self.attention = SelfAttention(config)
        self.sa_layer_norm = LayerNorm(config.dim, _EPSILON)
        self.ffn = FeedForward(config)
        self.output_layer_norm = LayerNorm(config.dim, _EPSILON)

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B 1 #T T"]
    ) -> Float[Array, "B T H"]:
        x = self.sa_layer_norm(self.attention(x, bias) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Transformer(nnx.Module):
    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.layer = Stack(lambda: Layer(config), config.n_layers, rematerialize)


class DistilBert(nnx.Module):
    """Embeddings and encoder; the parameters under `distilbert.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config, config.dim, _EPSILON)
        self.transformer = Transformer(config, rematerialize)
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        token_ids, mask, _ = text_inputs(inputs, self.longest)
        rows = token_rows(inputs, mask)
        embedded = self.embeddings(rows.in_rows(token_ids), rows.positions)
        return encode(self.transformer.layer, embedded, rows, hidden_states)


class Classifier(nnx.Module):
    """The part of a `DistilBertForSequenceClassification` that each task keeps."""

    def __init__(self, config: Config, outputs: int | None = None):
        """Makes the layers, the last with so many outputs in place of one for each class."""
        self.pre_classifier = Linear(config.dim, config.dim)
        self.classifier = Linear(config.dim, outputs or config.num_labels)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        return self.classifier(jnp.maximum(self.pre_classifier(outputs.pooled), 0))


FAMILY = Family(
    backbone=partial(Prefixed, "distilbert", DistilBert),
    head=Classifier,
    prefixes=("distilbert.",),
    second_names_of_tables={
        "distilbert.embeddings.word_embeddings.weight": ("vocab_projector.weight",)
    },
    inputs=("input_ids", "attention_mask"),
    max_tokens=lambda config: config.max_position_embeddings,
    packs=True,
    heads=attention_heads(
        "*.attention.q_lin.*",
        "*.attention.k_lin.*",
        "*.attention.v_lin.*",
        "*.attention.out_lin.weight",
    ),
    auto_class="AutoModelForSequenceClassification",
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(TokenHead),
        MULTIPLE_CHOICE: HeadForm(partial(Classifier, outputs=1)),
    },
)
