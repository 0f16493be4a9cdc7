"""RoBERTa (Liu et al., 2019) for sequence classification, as `transformers` builds it.

BERT's layers without its pooler, with positions that skip padding, and with a head of two layers.
XLM-RoBERTa and CamemBERT are the same computation under the same names.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import RobertaConfig

from adamerge_jax.models.bert import Embeddings, Encoder
from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import Linear, Outputs, Rematerialize, padding_bias


def positions_of(token_ids: Int[Array, "B T"], padding: int) -> Int[Array, "B T"]:
    """The position of each token: counted over tokens that are not padding, from `padding + 1`.

    Padding is told by its token id, not by the attention mask, and sits at position `padding`.
    """
    present = (token_ids != padding).astype(token_ids.dtype)
    return jnp.cumsum(present, axis=1) * present + padding


class Roberta(nnx.Module):
    """Embeddings and encoder; the parameters under `roberta.` in a checkpoint."""

    def __init__(self, config: RobertaConfig, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, rematerialize)
        self.padding = config.pad_token_id
        # The first positions, up to that of padding, are never those of a token.
        self.longest = config.max_position_embeddings - config.pad_token_id - 1

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        token_ids, mask, token_types = text_inputs(inputs, self.longest)
        positions = positions_of(token_ids, self.padding)
        embedded = self.embeddings(token_ids, token_types, positions)
        last, every = self.encoder.layer(embedded, padding_bias(mask), hidden_states=hidden_states)
        return Outputs(last[:, 0], last, every)


class RobertaBackbone(nnx.Module):
    """What is merged in a `RobertaForSequenceClassification`."""

    def __init__(self, config: RobertaConfig, rematerialize: Rematerialize):
        self.roberta = Roberta(config, rematerialize)

    def __call__(
        self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool = False
    ) -> Outputs:
        return self.roberta(inputs, hidden_states)


class Classifier(nnx.Module):
    def __init__(self, config: RobertaConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def __call__(self, pooled: Float[Array, "B H"]) -> Float[Array, "B C"]:
        return self.out_proj(jnp.tanh(self.dense(pooled)))


class RobertaHead(nnx.Module):
    """What each task keeps of a `RobertaForSequenceClassification`."""

    def __init__(self, config: RobertaConfig):
        self.classifier = Classifier(config)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        return self.classifier(outputs.pooled)
