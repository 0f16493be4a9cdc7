"""ModernBERT (Warner et al., 2024) with heads on texts and on tokens, as `transformers` builds it.

Rotary positions, norms before attention and MLP, and in most layers attention to near tokens alone.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adamerge_jax.mixing import materialize
from adamerge_jax.models.decoder_layers import rotate, windows_by_type
from adamerge_jax.models.embedder import pool
from adamerge_jax.models.embedding_form import Pooling
from adamerge_jax.models.family import Family, HeadAxes, HeadForm
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
    activation_of,
    attention,
)
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.models.rotary import Rotary
from adamerge_jax.models.token_rows import distances, encode, token_rows


def _norm(config: Config) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


class Embeddings(nnx.Module):
    def __init__(self, config: Config):
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        return self.norm(self.tok_embeddings(token_ids))


class Attention(nnx.Module):
    """Attention whose queries, keys and values are one projection, in this order."""

    def __init__(self, config: Config):
        width, bias = config.hidden_size, config.attention_bias
        self.Wqkv = Linear(width, 3 * width, bias=bias)
        self.Wo = Linear(width, width, bias=bias)
        self.heads = config.num_attention_heads

    def __call__(
        self,
        x: Float[Array, "B T H"],
        bias: Float[Array, "B 1 #T T"],
        table: Float[Array, "2 *B T features/2"],
    ) -> Float[Array, "B T H"]:
        queries_and_keys, values = jnp.split(self.Wqkv(x), [2 * x.shape[-1]], axis=-1)
        by_head = queries_and_keys.reshape(*x.shape[:2], 2 * self.heads, -1)
        turned = rotate(by_head, table).reshape(queries_and_keys.shape)
        query, key = jnp.split(turned, 2, axis=-1)
        return self.Wo(attention(query, key, values, self.heads, bias))


class GatedMLP(nnx.Module):
    """An MLP whose two inner projections are one, the activated one first."""

    def __init__(self, config: Config):
        width, intermediate = config.hidden_size, config.intermediate_size
        self.Wi = Linear(width, 2 * intermediate, bias=config.mlp_bias)
        self.Wo = Linear(intermediate, width, bias=config.mlp_bias)
        self.activation = activation_of(config.hidden_activation)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        activated, gate = jnp.split(self.Wi(x), 2, axis=-1)
        return self.Wo(self.activation(activated) * gate)


class Layer(nnx.Module):
    """What all layers have; the norm before attention, which the first one lacks, is given."""

    def __init__(self, config: Config):
        self.attn = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = GatedMLP(config)

    def __call__(
        self,
        x: Float[Array, "B T H"],
        bias: Float[Array, "B 1 #T T"],
        tables: Float[Array, "rotaries 2 *B T features/2"],
        window: Int[Array, ""],
        rotary: Int[Array, ""],
        has_norm: Bool[Array, ""],
        norm: LayerNorm | None,
    ) -> Float[Array, "B T H"]:
        """Runs the layer.

        Args:
            x: The layer's input.
            bias: The term of scores by which no token sees another text, or padding.
            tables: Cosines and sines of every rotation in the model.
            window: The distance of the furthest tokens that a token sees.
            rotary: The index of this layer's table.
            has_norm: False in the first layer, whose attention reads the input as it is.
            norm: The norm before attention; None for a model of one layer.
        """
        near = jnp.abs(distances(x.shape[1])) <= window
        seen = jnp.where(near, bias, jnp.finfo(jnp.float32).min)
        normalised = x if norm is None else jnp.where(has_norm, norm(x), x)
        x = x + self.attn(normalised, seen, tables[rotary])
        return x + self.mlp(self.mlp_norm(x))


class AttentionNorm(nnx.Module):
    """The norm before attention of one layer."""

    def __init__(self, config: Config):
        self.attn_norm = _norm(config)


class Layers(Stack):
    """Stacked layers, and at the attributes `1`, `2`, ... their norms before attention.

    Layer 0 has none, so that these are not stacked among the parameters.
    """

    def __init__(self, config: Config, rematerialize: Rematerialize):
        super().__init__(lambda: Layer(config), config.num_hidden_layers, rematerialize)
        self.with_norm = range(1, config.num_hidden_layers)
        for number in self.with_norm:
            setattr(self, str(number), AttentionNorm(config))

    def norms(self) -> LayerNorm | None:
        """Returns the norms of all layers as one, `[L, H]`, that of layer 0 of zeros."""
        norms = [materialize(getattr(self, str(number)).attn_norm) for number in self.with_norm]
        if not norms:
            return None
        return jax.tree.map(lambda *rows: jnp.stack([jnp.zeros_like(rows[0]), *rows]), *norms)


class ModernBert(nnx.Module):
    """Embeddings, layers and the last norm; the parameters under `model.` in a checkpoint."""

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config)
        self.layers = Layers(config, rematerialize)
        self.final_norm = _norm(config)
        self.windows = tuple(windows_by_type(config))
        self.rotaries = tuple(Rotary.of(config, kind) for kind in config.layer_types)
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]], hidden_states: bool) -> Outputs:
        token_ids, mask, _ = text_inputs(inputs, self.longest)
        rows, length = token_rows(inputs, mask), mask.shape[1]
        rotaries = list(dict.fromkeys(self.rotaries))
        tables = jnp.stack([rotary.table(length)[:, rows.positions] for rotary in rotaries])
        outputs = encode(
            self.layers,
            self.embeddings(rows.in_rows(token_ids)),
            rows,
            hidden_states,
            tables,
            per_layer=(
                jnp.array([length if window is None else window for window in self.windows]),
                jnp.array([rotaries.index(rotary) for rotary in self.rotaries]),
                jnp.arange(len(self.windows)) > 0,
                self.layers.norms(),
            ),
            norm=self.final_norm,
        )
        return outputs._replace(inputs={"attention_mask": mask})


class PredictionHead(nnx.Module):
    """The layer below the classifier, of the same form as in pretraining."""

    def __init__(self, config: Config):
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.norm = _norm(config)
        self.activation = activation_of(config.classifier_activation)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        return self.norm(self.activation(self.dense(x)))


class WordHead(nnx.Module):
    """The part of a `ModernBertForTokenClassification` that each task keeps."""

    def __init__(self, config: Config, outputs: int | None = None):
        """Makes the layers, the last with so many outputs in place of one for each class."""
        self.head = PredictionHead(config)
        self.classifier = Linear(config.hidden_size, outputs or config.num_labels)
        self.pooling = config.classifier_pooling

    def __call__(self, outputs: Outputs) -> Float[Array, "B ... C"]:
        return self.classifier(self.head(self.features(outputs)))

    def features(self, outputs: Outputs) -> Float[Array, "B ... H"]:
        """Returns the states that are classified."""
        return outputs.last_hidden_state


class TextHead(WordHead):
    """The part of a `ModernBertForSequenceClassification` that each task keeps."""

    def features(self, outputs: Outputs) -> Float[Array, "B H"]:
        """Returns the state of each text's first token, or the mean of all."""
        if self.pooling == "mean":
            return _pooled(outputs, "mean")
        assert outputs.pooled is not None  # by `ModernBert`
        return outputs.pooled


class ChoiceHead(WordHead):
    """The part of a `ModernBertForMultipleChoice` that each task keeps."""

    def __init__(self, config: Config):
        super().__init__(config, outputs=1)

    def features(self, outputs: Outputs) -> Float[Array, "B H"]:
        """Returns the state of each text's first token that is not padding, or the mean of all."""
        return _pooled(outputs, self.pooling)


def _pooled(outputs: Outputs, pooling: Pooling) -> Float[Array, "B H"]:
    """Returns the state of each text's first token that is not padding, or the mean of all."""
    last, inputs = outputs.last_hidden_state, outputs.inputs
    assert inputs is not None  # by `ModernBert`, and of choices by `ChoicesBackbone`
    mask = inputs.get("attention_mask", jnp.ones(last.shape[:2], jnp.int32))
    return pool(last, mask.reshape(last.shape[:2]), pooling).astype(last.dtype)


def _heads(config: Config) -> HeadAxes:
    heads = config.num_attention_heads
    return {"*.attn.Wqkv.*": (0, 3 * heads), "*.attn.Wo.weight": (1, heads)}


FAMILY = Family(
    backbone=partial(Prefixed, "model", ModernBert),
    head=TextHead,
    prefixes=("model.",),
    second_names_of_tables={"model.embeddings.tok_embeddings.weight": ("decoder.weight",)},
    inputs=("input_ids", "attention_mask"),
    max_tokens=lambda config: config.max_position_embeddings,
    packs=True,
    heads=_heads,
    auto_class="AutoModelForSequenceClassification",
    # The head of pretraining, with which a sentence embedder may have been saved.
    ignored_in_experts=("head.*", "decoder.*"),
    further_heads={
        TOKEN_CLASSIFICATION: HeadForm(WordHead),
        MULTIPLE_CHOICE: HeadForm(ChoiceHead),
    },
)
