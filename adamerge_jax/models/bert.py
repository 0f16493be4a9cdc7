"""BERT (Devlin et al., 2019) with heads on texts and on tokens, as `transformers` builds it."""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.family import Family, HeadForm, attention_heads
from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    LinearHead,
    Outputs,
    Prefixed,
    Rematerialize,
    Stack,
    TokenHead,
    activation_of,
    attention,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.token_rows import TokenRows, encode, token_rows


class Embeddings(nnx.Module):
    def __init__(self, config: Config, features: int):
        self.word_embeddings = Embedding(config.vocab_size, features)
        self.position_embeddings = Embedding(config.max_position_embeddings, features)
        self.token_type_embeddings = Embedding(config.type_vocab_size, features)
        self.LayerNorm = LayerNorm(features, config.layer_norm_eps)

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        positions: Int[Array, "... T"],
    ) -> Float[Array, "B T H"]:
        embedded = self.word_embeddings(token_ids) + self.token_type_embeddings(token_types)
        return self.LayerNorm(embedded + self.position_embeddings(positions))


def embedded_rows(
    embeddings: nnx.Module, inputs: Mapping[str, Int[Array, "B T"]], longest: int
) -> tuple[Float[Array, "R L H"], TokenRows]:
    """Embeds texts whose tokens have types, and positions from 0 on.

    Args:
        embeddings: The module, of token ids, types and positions.
        inputs: The batch.
        longest: The number of positions.

    Returns:
        The embedded tokens by row, and the rows that the texts are in.
    """
    token_ids, mask, token_types = text_inputs(inputs, longest)
    rows = token_rows(inputs, mask)
    by_row = rows.in_rows(token_ids), rows.in_rows(token_types)
    return embeddings(*by_row, rows.positions), rows


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B 1 #T T"]
    ) -> Float[Array, "B T H"]:
        return attention(self.query(x), self.key(x), self.value(x), self.heads, bias)


class AddAndNorm(nnx.Module):
    """A projection added to the residual stream and normalised after it."""

    def __init__(self, inputs: int, config: Config):
        self.dense = Linear(inputs, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, x: Float[Array, "B T inputs"], residual: Float[Array, "B T H"]
    ) -> Float[Array, "B T H"]:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nnx.Module):
    def __init__(self, config: Config, make_self: Callable[[Config], nnx.Module] = SelfAttention):
        self.self = make_self(config)
        self.output = AddAndNorm(config.hidden_size, config)

    def __call__(self, x: Float[Array, "B T H"], *arguments: Array) -> Float[Array, "B T H"]:
        return self.output(self.self(x, *arguments), x)


class Intermediate(nnx.Module):
    def __init__(self, config: Config):
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T intermediate"]:
        return self.activation(self.dense(x))


class Layer(nnx.Module):
    """Attention and an MLP, the sum of each with its input normalised behind it."""

    def __init__(self, config: Config, attention: nnx.Module):
        self.attention = attention
        self.intermediate = Intermediate(config)
        self.output = AddAndNorm(config.intermediate_size, config)

    def __call__(self, x: Float[Array, "B T H"], *arguments: Array) -> Float[Array, "B T H"]:
        """Runs the layer; further arguments, such as the term of scores, are the attention's."""
        x = self.attention(x, *arguments)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    def __init__(
        self,
        config: Config,
        rematerialize: Rematerialize,
        attention: Callable[[Config], nnx.Module] = Attention,
    ):
        _require_encoder(config)
        self.layer = Stack(
            lambda: Layer(config, attention(config)), config.num_hidden_layers, rematerialize
        )


class Pooler(nnx.Module):
    def __init__(self, config: Config):
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, first: Float[Array, "B H"]) -> Float[Array, "B H"]:
        return jnp.tanh(self.dense(first))


class Bert(nnx.Module):
    """Embeddings, encoder and pooler; the parameters under `bert.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize, pooler: bool = True):
        self.embeddings = Embeddings(config, config.hidden_size)
        self.encoder = Encoder(config, rematerialize)
        self.pooler = Pooler(config) if pooler else None
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        embedded, rows = embedded_rows(self.embeddings, inputs, self.longest)
        outputs = encode(self.encoder.layer, embedded, rows, hidden_states)
        return outputs._replace(pooled=self.pooler(outputs.pooled) if self.pooler else None)


class PooledHead(nnx.Module):
    """A head of classes with the pooler, where the backbone has none."""

    def __init__(self, config: Config, prefix: str = "bert", outputs: int | None = None):
        """Makes the pooler under a prefix, and a layer of so many outputs in place of classes."""
        setattr(self, prefix, OnlyPooler(config))
        self.prefix = prefix
        self.classifier = Linear(config.hidden_size, outputs or config.num_labels)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        pooler = getattr(self, self.prefix).pooler
        return self.classifier(pooler(outputs.last_hidden_state[:, 0]))


class OnlyPooler(nnx.Module):
    """The pooler of a backbone that lacks it."""

    def __init__(self, config: Config):
        self.pooler = Pooler(config)


def _require_encoder(config: Config) -> None:
    """Refuses configs whose tokens do not see later ones, or see those of another model."""
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise InputError(
                f"config.json: {name} is true, which makes a decoder of a "
                f"{config.model_type!r}; only classifiers that see a text in both directions are "
                "supported"
            )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise InputError(
            f"config.json: position_embedding_type {positions!r} is not supported; supported is "
            "'absolute', a position embedding for each token"
        )


BERT_HEADS = attention_heads(
    "*.attention.self.query.*",
    "*.attention.self.key.*",
    "*.attention.self.value.*",
    "*.attention.output.dense.weight",
)

_UNPOOLED = partial(Prefixed, "bert", partial(Bert, pooler=False))

FAMILY = Family(
    backbone=partial(Prefixed, "bert", Bert),
    head=LinearHead,
    prefixes=("bert.",),
    second_names_of_tables={
        "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",)
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_tokens=lambda config: config.max_position_embeddings,
    packs=True,
    heads=BERT_HEADS,
    auto_class="AutoModelForSequenceClassification",
    embedding_backbone=_UNPOOLED,
    # `transformers` makes these without the pooler; older versions made and saved it.
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(
            TokenHead, backbone=_UNPOOLED, ignored=("bert.pooler.*", "pooler.*")
        ),
        MULTIPLE_CHOICE: HeadForm(partial(LinearHead, outputs=1)),
    },
    head_with_rest=PooledHead,
)
