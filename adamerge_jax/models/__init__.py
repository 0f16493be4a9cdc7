"""Model families: the backbone that is merged, the head that each task keeps.

A model is described by its `transformers` config. `family_of(config)` finds its family; the
family builds the backbone and the head as `Network`s, pure functions of flat parameter dictionaries
whose keys are the names in a Hugging Face checkpoint (`*` where layers are stacked).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, PyTree
from transformers import PretrainedConfig

from adamerge_jax.errors import InputError
from adamerge_jax.models.bert import BertBackbone, BertHead
from adamerge_jax.models.clip import ClipVisionBackbone, ZeroShotHead
from adamerge_jax.models.decoder_layers import CausalHead, ignored_decoder_tensors
from adamerge_jax.models.gemma2 import Gemma2Backbone, GemmaHead
from adamerge_jax.models.gemma3 import Gemma3Backbone
from adamerge_jax.models.layers import Outputs, Rematerialize
from adamerge_jax.models.llama import LlamaBackbone
from adamerge_jax.models.mistral import MistralBackbone
from adamerge_jax.models.qwen2 import Qwen2Backbone
from adamerge_jax.models.qwen3 import Qwen3Backbone
from adamerge_jax.models.roberta import RobertaBackbone, RobertaHead
from adamerge_jax.models.t5 import T5Backbone, T5Head, ignored_tensors
from adamerge_jax.models.vit import VitBackbone, VitHead

__all__ = [
    "OUTPUT_LAYER",
    "Family",
    "Network",
    "Outputs",
    "Rematerialize",
    "complete_head",
    "family_of",
]

OUTPUT_LAYER = "lm_head.weight"
"""What a language model's own output layer is called."""


class Network:
    """An NNX module as a pure function of its parameters.

    Attributes:
        shapes: Shape and dtype of every parameter by name, `[L, *shape]` where stacked.
    """

    def __init__(self, make_module: Callable[[], nnx.Module]):
        """Builds the module abstractly: no parameter is allocated."""
        self._graph, state = nnx.split(nnx.eval_shape(make_module))
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {
            ".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)
        }

    def __call__(self, parameters: Mapping[str, Array], *arguments: PyTree, **options: Any) -> Any:
        """Calls the module with the given parameters, arrays or `Mixture`s by name."""
        nested: dict[str, Any] = {}
        for name, leaf in parameters.items():
            *modules, attribute = name.split(".")
            module = nested
            for key in modules:
                module = module.setdefault(key, {})
            module[attribute] = leaf
        return nnx.merge(self._graph, nnx.State(nested))(*arguments, **options)


def complete_head(
    head: Network, own: Mapping[str, Array], backbone: Mapping[str, Array]
) -> dict[str, Array]:
    """The parameters of a head: what the task keeps for itself, and for the rest the backbone's."""
    return {name: own[name] if name in own else backbone[name] for name in head.shapes}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        backbone: Makes the module that is merged, from a config.
        head: Makes the module that each task keeps, from a config.
        prefixes: What a checkpoint saved without its head may lack in front of backbone names.
        inputs: Names of the arrays in a batch, the first one required.
        max_tokens: The longest text that a model of this config can read; None for images.
        heads: From a config, name patterns of parameters with attention heads side by side, the
            axis they lie along (0 for projections to queries, keys and values, 1 for the output
            projection) and their number.
        auto_class: The `transformers` class that loads a task's model, or None where a head is
            no part of a checkpoint.
        base_only: Name patterns of backbone parameters that an expert may lack, and which then stay
            the base's. A CLIP expert is a vision tower, without the projection behind it.
        ignored: From a config, name patterns of tensors in a checkpoint that are no parameters.
        ignored_in_experts: Name patterns of parameters outside the backbone that an expert may
            bring and that are not used. What the base brings of them is carried into the merge.
        renamed: Parts of names in a checkpoint, and what they are in the model that `transformers`
            makes of it, whose names adapters have; in the order in which to replace them.
        language: Whether it predicts tokens, with an output layer that is merged like all others,
            rather than classes, with a head of each task's own.
    """

    backbone: Callable[[PretrainedConfig, Rematerialize], nnx.Module]
    head: Callable[[PretrainedConfig], nnx.Module]
    prefixes: tuple[str, ...]
    inputs: tuple[str, ...]
    max_tokens: Callable[[PretrainedConfig], int | None]
    heads: Callable[[PretrainedConfig], Mapping[str, tuple[int, int]]]
    auto_class: str | None
    base_only: tuple[str, ...] = ()
    ignored: Callable[[PretrainedConfig], tuple[str, ...]] = lambda config: ("*.position_ids",)
    ignored_in_experts: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    language: bool = False

    def build_backbone(
        self, config: PretrainedConfig, rematerialize: Rematerialize = "elementwise"
    ) -> Network:
        """The backbone as a function `(parameters, inputs, hidden_states=False) -> Outputs`."""
        return Network(partial(self.backbone, config, rematerialize))

    def build_head(self, config: PretrainedConfig) -> Network:
        """The head as a function `(parameters, outputs) -> logits [B, C]`, or `[B, T, V]`.

        What a task does not keep for itself of these parameters is the backbone's.
        """
        return Network(partial(self.head, config))

    def tied(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Names of the embedding tables that are the output layer too."""
        if not self.language:
            return ()
        return tuple(name for name in self.build_head(config).shapes if name != OUTPUT_LAYER)


def _heads(
    query: str, key: str, value: str, output: str, part: str | None = None
) -> Callable[[PretrainedConfig], Mapping[str, tuple[int, int]]]:
    """Where attention heads are, from the name patterns of the four projections.

    Keys and values may have fewer heads than queries. `part` is that of the config which says.
    """

    def heads(config: PretrainedConfig) -> Mapping[str, tuple[int, int]]:
        config = getattr(config, part) if part else config
        count = config.num_attention_heads
        key_value = getattr(config, "num_key_value_heads", None) or count
        return {query: (0, count), key: (0, key_value), value: (0, key_value), output: (1, count)}

    return heads


_BERT_HEADS = _heads(
    "*.attention.self.query.*",
    "*.attention.self.key.*",
    "*.attention.self.value.*",
    "*.attention.output.dense.weight",
)

_ROBERTA = Family(
    backbone=RobertaBackbone,
    head=RobertaHead,
    prefixes=("roberta.",),
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_tokens=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    heads=_BERT_HEADS,
    auto_class="AutoModelForSequenceClassification",
    # Older versions of `transformers` made and saved it with classifiers that do not read it.
    ignored_in_experts=("roberta.pooler.*",),
)


def _decoder(
    backbone: Callable[[PretrainedConfig, Rematerialize], nnx.Module],
    head: Callable[[PretrainedConfig], nnx.Module] = CausalHead,
) -> Family:
    """A family of decoder language models."""
    return Family(
        backbone=backbone,
        head=head,
        prefixes=("model.",),
        inputs=("input_ids", "attention_mask"),
        max_tokens=lambda config: config.max_position_embeddings,
        heads=_heads(
            "*.self_attn.q_proj.*",
            "*.self_attn.k_proj.*",
            "*.self_attn.v_proj.*",
            "*.self_attn.o_proj.weight",
        ),
        auto_class="AutoModelForCausalLM",
        ignored=ignored_decoder_tensors,
        language=True,
    )


FAMILIES = {
    "bert": Family(
        backbone=BertBackbone,
        head=BertHead,
        prefixes=("bert.",),
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        max_tokens=lambda config: config.max_position_embeddings,
        heads=_BERT_HEADS,
        auto_class="AutoModelForSequenceClassification",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "vit": Family(
        backbone=VitBackbone,
        head=VitHead,
        prefixes=("vit.",),
        inputs=("pixel_values",),
        max_tokens=lambda config: None,
        heads=_heads(
            "*.attention.attention.query.*",
            "*.attention.attention.key.*",
            "*.attention.attention.value.*",
            "*.attention.output.dense.weight",
        ),
        auto_class="AutoModelForImageClassification",
        renamed=(
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
    "clip": Family(
        backbone=ClipVisionBackbone,
        head=ZeroShotHead,
        prefixes=("vision_model.",),
        inputs=("pixel_values",),
        max_tokens=lambda config: None,
        heads=_heads(
            "*.self_attn.q_proj.*",
            "*.self_attn.k_proj.*",
            "*.self_attn.v_proj.*",
            "*.self_attn.out_proj.weight",
            part="vision_config",
        ),
        auto_class=None,
        base_only=("visual_projection.*",),
        ignored_in_experts=("text_model.*", "text_projection.*", "logit_scale"),
    ),
    "t5": Family(
        backbone=T5Backbone,
        head=T5Head,
        prefixes=(),
        inputs=("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
        max_tokens=lambda config: None,
        heads=_heads("*.q.weight", "*.k.weight", "*.v.weight", "*.o.weight"),
        auto_class="AutoModelForSeq2SeqLM",
        ignored=ignored_tensors,
        language=True,
    ),
    "llama": _decoder(LlamaBackbone),
    "mistral": _decoder(MistralBackbone),
    "qwen2": _decoder(Qwen2Backbone),
    "qwen3": _decoder(Qwen3Backbone),
    "gemma2": _decoder(Gemma2Backbone, GemmaHead),
    "gemma3_text": _decoder(Gemma3Backbone, GemmaHead),
}
"""Families by the `model_type` of their configs."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a base model's config.

    Raises:
        InputError: No family here has that `model_type`, or it is that of one tower of a CLIP,
            which is no base: a base brings the projection and the text tower too.
    """
    if config.model_type in ("clip_vision_model", "clip_text_model"):
        raise InputError(
            f"config.json: model_type {config.model_type!r} is one tower of a CLIP; the base must "
            "be a whole CLIP (model_type 'clip'), only experts may be vision towers"
        )
    if config.model_type not in FAMILIES:
        raise InputError(
            f"config.json: model_type {config.model_type!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]
