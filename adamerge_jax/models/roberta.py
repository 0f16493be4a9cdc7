"""RoBERTa (Liu et al., 2019) with heads on texts and on tokens, as `transformers` builds it.

BERT's layers without its pooler, with positions that skip padding; a text's head has two layers.
XLM-RoBERTa and CamemBERT are the same computation under the same names.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.bert import BERT_HEADS, Embeddings, Encoder, PooledHead
from adamerge_jax.models.family import Family, HeadForm, LastLayer
from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import (
    Activation,
    Config,
    Linear,
    Outputs,
    Prefixed,
    Rematerialize,
    TokenHead,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.token_rows import encode, token_rows


def positions_of(token_ids: Int[Array, "B T"], padding: int) -> Int[Array, "B T"]:
    """Returns the position of each token, counted over tokens that are not padding.

    The first one is at `padding + 1`. Padding is recognised by its token id, not by the attention
    mask, and is at position `padding`.
    """
    present = (token_ids != padding).astype(token_ids.dtype)
    return jnp.cumsum(present, axis=1) * present + padding


class Roberta(nnx.Module):
    """Embeddings and encoder; the parameters under `roberta.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        _require_padding(config)
        self.embeddings = Embeddings(config, config.hidden_size)
        self.encoder = Encoder(config, rematerialize)
        self.padding = config.pad_token_id
        # The first positions, up to that of padding, are never those of a token.
        self.longest = config.max_position_embeddings - config.pad_token_id - 1

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        token_ids, mask, token_types = text_inputs(inputs, self.longest)
        rows = token_rows(inputs, mask)
        positions = positions_of(token_ids, self.padding)
        embedded = self.embeddings(*map(rows.in_rows, (token_ids, token_types, positions)))
        return encode(self.encoder.layer, embedded, rows, hidden_states)


def _require_padding(config: Config) -> None:
    """Refuses configs whose positions, which follow that of padding, do not exist."""
    padding, count = config.pad_token_id, config.max_position_embeddings
    if not isinstance(padding, int) or not 0 <= padding < count - 1:
        raise InputError(
            f"config.json: pad_token_id is {padding}; positions are counted from it, so it must "
            f"be a whole number from 0 to {count - 2} (max_position_embeddings - 2)"
        )


class Classifier(nnx.Module):
    def __init__(self, config: Config, activation: Activation):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.num_labels)
        self.activation = activation

    def __call__(self, pooled: Float[Array, "B H"]) -> Float[Array, "B C"]:
        return self.out_proj(self.activation(self.dense(pooled)))


class TwoLayerHead(nnx.Module):
    """A head of two linear layers on the first token, the parameters under `classifier.`."""

    def __init__(self, config: Config, activation: Activation = jnp.tanh):
        self.classifier = Classifier(config, activation)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        return self.classifier(outputs.pooled)


OUT_PROJ = LastLayer("classifier.out_proj.weight", "classifier.out_proj.bias")
"""The last layer of a `TwoLayerHead`."""

FAMILY = Family(
    backbone=partial(Prefixed, "roberta", Roberta),
    head=TwoLayerHead,
    prefixes=("roberta.",),
    second_names_of_tables={
        "roberta.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",)
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_tokens=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    packs=True,
    heads=BERT_HEADS,
    auto_class="AutoModelForSequenceClassification",
    last_layer=OUT_PROJ,
    # Older versions of `transformers` made and saved it with classifiers that do not read it.
    ignored_in_experts=("roberta.pooler.*",),
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(TokenHead),
        # These read the pooler, which bases often lack: it is a part of their heads.
        MULTIPLE_CHOICE: HeadForm(partial(PooledHead, prefix="roberta", outputs=1)),
    },
)
