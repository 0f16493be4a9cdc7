"""ELECTRA (Clark et al., 2020) with heads on texts and on tokens, as `transformers` builds it.

BERT's layers without its pooler. Embeddings may be narrower than the layers.
"""

from collections.abc import Mapping
from functools import partial

from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.bert import BERT_HEADS, Embeddings, Encoder, embedded_rows
from adamerge_jax.models.family import Family, HeadForm
from adamerge_jax.models.layers import (
    Config,
    Linear,
    LinearHead,
    Outputs,
    Prefixed,
    Rematerialize,
    TokenHead,
    activation_of,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.roberta import OUT_PROJ, TwoLayerHead
from adamerge_jax.models.token_rows import encode


class Electra(nnx.Module):
    """Embeddings and encoder; the parameters under `electra.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config, config.embedding_size)
        sizes = config.embedding_size, config.hidden_size
        self.embeddings_project = Linear(*sizes) if sizes[0] != sizes[1] else None
        self.encoder = Encoder(config, rematerialize)
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        embedded, rows = embedded_rows(self.embeddings, inputs, self.longest)
        if self.embeddings_project is not None:
            embedded = self.embeddings_project(embedded)
        return encode(self.encoder.layer, embedded, rows, hidden_states)


class Summary(nnx.Module):
    def __init__(self, config: Config):
        self.summary = Linear(config.hidden_size, config.hidden_size)
        name = config.summary_activation
        self.activation = activation_of(name) if name else None

    def __call__(self, first: Float[Array, "B H"]) -> Float[Array, "B H"]:
        summary = self.summary(first)
        return summary if self.activation is None else self.activation(summary)


class ChoiceHead(LinearHead):
    """The part of an `ElectraForMultipleChoice` that each task keeps."""

    def __init__(self, config: Config):
        _require_summary(config)
        super().__init__(config, outputs=1)
        self.sequence_summary = Summary(config)

    def __call__(self, outputs: Outputs) -> Float[Array, "B 1"]:
        return self.classifier(self.sequence_summary(outputs.last_hidden_state[:, 0]))


def _require_summary(config: Config) -> None:
    """Refuses configs whose choices are compared by something else than a layer on one token."""
    supported = {"summary_type": "first", "summary_use_proj": True, "summary_proj_to_labels": False}
    for name, expected in supported.items():
        found = getattr(config, name, expected)
        if found != expected:
            raise InputError(
                f"config.json: {name} is {found!r}; models of multiple choice are supported where "
                f"it is {expected!r}, a layer of the hidden size on each choice's first token"
            )


FAMILY = Family(
    backbone=partial(Prefixed, "electra", Electra),
    # Their activation is GELU, whichever the layers have.
    head=partial(TwoLayerHead, activation=activation_of("gelu")),
    prefixes=("electra.",),
    second_names_of_tables={
        "electra.embeddings.word_embeddings.weight": ("generator_lm_head.weight",)
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_tokens=lambda config: config.max_position_embeddings,
    packs=True,
    heads=BERT_HEADS,
    auto_class="AutoModelForSequenceClassification",
    last_layer=OUT_PROJ,
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(TokenHead),
        MULTIPLE_CHOICE: HeadForm(ChoiceHead),
    },
)
