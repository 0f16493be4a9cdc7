"""Sentence embedders: a backbone whose tokens are pooled to one vector for each text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import EmbeddingForm, Pooling
from adamerge_jax.models.family import Family, Network
from adamerge_jax.models.layers import Config, Outputs, Rematerialize
from adamerge_jax.objectives.similarity import unit_length


class EmbeddingNetwork(Network):
    """A backbone with pooling: `(parameters, inputs, hidden_states=False) -> Outputs`.

    Inputs are those of single texts, `[B, T]` each, or of pairs, `[B, 2, T]`. The embeddings are
    the outputs' `pooled`, `[B, texts, H]`; of a pair's token vectors the second text's follow the
    first one's.

    Attributes:
        shapes: Shape and dtype of every parameter by name, `[L, *shape]` where stacked.
    """

    def __init__(self, backbone: Network, form: EmbeddingForm):
        """Wraps a backbone whose outputs have the last hidden state."""
        self.shapes = backbone.shapes
        self._backbone, self._form = backbone, form

    def __call__(
        self, parameters: Mapping[str, Array], inputs: PyTree, hidden_states: bool = False
    ) -> Outputs:
        """Embeds texts or pairs of texts."""
        examples, *texts, _ = inputs["input_ids"].shape
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in inputs.items()}
        outputs = self._backbone(parameters, flat, hidden_states=hidden_states)
        token_ids = flat["input_ids"]
        mask = flat.get("attention_mask", jnp.ones_like(token_ids))
        embeddings = pool(outputs.last_hidden_state, mask, self._form.pooling)
        if self._form.normalised:
            embeddings = unit_length(embeddings)
        per_example = texts[0] if texts else 1
        last, states = outputs.last_hidden_state, outputs.hidden_states
        features = last.shape[-1]
        return Outputs(
            embeddings.reshape(examples, per_example, features),
            last.reshape(examples, -1, features),
            None if states is None else states.reshape(len(states), examples, -1, features),
        )


def pool(
    hidden: Float[Array, "N T H"], mask: Int[Array, "N T"], pooling: Pooling
) -> Float[Array, "N H"]:
    """Makes one vector of the vectors of a text's tokens, in float32.

    Args:
        hidden: The last hidden state.
        mask: 1 for each token, 0 for padding.
        pooling: The tokens that count.
    """
    wide = hidden.astype(jnp.float32)
    if pooling == "mean":
        counts = (mask > 0).astype(jnp.float32)[..., None]
        return (wide * counts).sum(1) / jnp.maximum(counts.sum(1), 1)
    present = (mask > 0).astype(jnp.int32)
    position = jnp.argmax(present, axis=1)
    if pooling == "lasttoken":
        position = present.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
    return jnp.take_along_axis(wide, position[:, None, None], axis=1)[:, 0]


class EmbeddingHead(nnx.Module):
    """The head of a sentence embedder, which has no parameters: the embeddings themselves."""

    def __init__(self, config: Config):
        """Makes nothing."""

    def __call__(self, outputs: Outputs) -> Float[Array, "B texts H"]:
        """Returns the embeddings."""
        return outputs.pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedderFamily(Family):
    """The sentence embedders of one architecture.

    Attributes:
        plain: The architecture.
    """

    plain: Family

    def build_backbone(
        self, config: Config, rematerialize: Rematerialize = "elementwise"
    ) -> EmbeddingNetwork:
        """Returns the backbone with pooling; see `EmbeddingNetwork`."""
        assert self.embeds is not None  # by `embedder_family`
        return EmbeddingNetwork(self.plain.build_backbone(config, rematerialize), self.embeds)


def embedder_family(plain: Family, form: EmbeddingForm) -> EmbedderFamily:
    """Returns the family of the sentence embedders of an architecture.

    Args:
        plain: The architecture's family.
        form: The pooling, and all else around the model.

    Raises:
        InputError: The architecture has no hidden state for each token of one text.
    """
    if plain.inputs[0] != "input_ids" or any("decoder" in name for name in plain.inputs):
        raise InputError(
            "config.json: sentence embedders are supported where one stack of layers reads texts, "
            "and this model has a decoder behind an encoder, or reads images"
        )
    body = dataclasses.replace(plain, backbone=plain.embedding_backbone or plain.backbone)
    fields: dict[str, Any] = {
        field.name: getattr(body, field.name) for field in dataclasses.fields(Family)
    }
    output_layer = f"{plain.output_layer.removesuffix('.weight')}.*"
    fields |= {
        "head": EmbeddingHead,
        "auto_class": "AutoModel",
        "last_layer": None,
        "ignored_in_experts": (*plain.ignored_in_experts, *POOLER, *_HEADS, output_layer),
        "base_only": (*plain.base_only, *POOLER),
        "language": False,
        "cached_features": None,
        "embeds": form,
    }
    return EmbedderFamily(**fields, plain=body)


POOLER = ("pooler.*", "*.pooler.*")
"""Name patterns of the part of a model without a head that no embedding depends on."""

_HEADS = ("cls.*", "classifier.*", "vocab_*", "generator_*", "discriminator_predictions.*")
"""Name patterns of heads with which an expert may have been saved, beside an output layer."""
