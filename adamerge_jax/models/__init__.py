"""Model architectures, one file each, found by the `model_type` of a `transformers` config."""

import importlib
from typing import TYPE_CHECKING

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from adamerge_jax.models.embedding_form import EmbeddingForm
    from adamerge_jax.models.family import Family

ARCHITECTURES = {
    "bert": "adamerge_jax.models.bert",
    "camembert": "adamerge_jax.models.roberta",
    "clip": "adamerge_jax.models.clip",
    "cohere": "adamerge_jax.models.cohere",
    "cohere2": "adamerge_jax.models.cohere2",
    "deberta-v2": "adamerge_jax.models.deberta_v2",
    "deit": "adamerge_jax.models.deit",
    "dinov2": "adamerge_jax.models.dinov2",
    "dinov2_with_registers": "adamerge_jax.models.dinov2",
    "distilbert": "adamerge_jax.models.distilbert",
    "electra": "adamerge_jax.models.electra",
    "gemma2": "adamerge_jax.models.gemma2",
    "gemma3_text": "adamerge_jax.models.gemma3",
    "gpt_neox": "adamerge_jax.models.gpt_neox",
    "granite": "adamerge_jax.models.granite",
    "llama": "adamerge_jax.models.llama",
    "mistral": "adamerge_jax.models.mistral",
    "mixtral": "adamerge_jax.models.mixtral",
    "modernbert": "adamerge_jax.models.modernbert",
    "mpnet": "adamerge_jax.models.mpnet",
    "olmo2": "adamerge_jax.models.olmo2",
    "olmoe": "adamerge_jax.models.olmoe",
    "phi3": "adamerge_jax.models.phi3",
    "qwen2": "adamerge_jax.models.qwen2",
    "qwen2_moe": "adamerge_jax.models.qwen2_moe",
    "qwen3": "adamerge_jax.models.qwen3",
    "qwen3_moe": "adamerge_jax.models.qwen3_moe",
    "roberta": "adamerge_jax.models.roberta",
    "siglip": "adamerge_jax.models.siglip",
    "smollm3": "adamerge_jax.models.smollm3",
    "stablelm": "adamerge_jax.models.stablelm",
    "starcoder2": "adamerge_jax.models.starcoder2",
    "t5": "adamerge_jax.models.t5",
    "vit": "adamerge_jax.models.vit",
    "xlm-roberta": "adamerge_jax.models.roberta",
}
"""The module of each `model_type`, whose `FAMILY` describes the architecture.

A module is imported when a model of its type is opened.
"""

_BRIDGE = "adamerge_jax.models.bridge.family"


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
"""The ends of names of classes that no language model of a family here is."""

_OTHERS = ("ForCausalLM", "LMHeadModel", "ForImageClassificationWithTeacher")
"""The ends of names of classes that no encoder of a family here is: language models, and a DeiT
that gives the mean of two heads."""


def is_known(config: "PretrainedConfig", architecture: str | None = None) -> bool:
    """Returns True if a family here runs the models of a config.

    Args:
        config: The config of the base.
        architecture: The class of the experts' models. Families of language models here have no
            classifiers, and those of encoders no language models:
            `LlamaForSequenceClassification` and `BertLMHeadModel` run by their PyTorch forward. So
            does a DeiT with two heads.
    """
    if config.model_type not in ARCHITECTURES or not _own_family(config).runs(config):
        return False
    others = _CLASSIFIERS if _own_family(config).language else _OTHERS
    return architecture is None or not architecture.endswith(others)


def _own_family(config: "PretrainedConfig") -> "Family":
    family: Family = importlib.import_module(ARCHITECTURES[config.model_type]).FAMILY
    return family


def family_of(
    config: "PretrainedConfig",
    architecture: str | None = None,
    *,
    embeds: "EmbeddingForm | None" = None,
) -> "Family":
    """Returns the family of a base model's config.

    A model that no family here runs, runs by its own PyTorch forward.

    Args:
        config: The config of the base.
        architecture: The class of the experts' models, `DistilBertForSequenceClassification`; None
            where only families here are asked for.
        embeds: The way from texts to embeddings of sentence embedders, whose class says nothing;
            None for other models.

    Raises:
        InputError: No family here has that `model_type` and its PyTorch forward cannot run, or it
            is that of one tower of a CLIP, which is no base: a base brings the projection and the
            text tower too; or the architecture has no sentence embedders.
    """
    if config.model_type in ("clip_vision_model", "clip_text_model"):
        raise InputError(
            f"config.json: model_type {config.model_type!r} is one tower of a CLIP; the base must "
            "be a whole CLIP (model_type 'clip'), only experts may be vision towers"
        )
    if is_known(config, architecture):
        family = _own_family(config)
    elif embeds is not None:
        family = importlib.import_module(_BRIDGE).bridged_encoder(config)
    elif architecture is not None:
        family = importlib.import_module(_BRIDGE).bridged_family(config, architecture)
    elif config.model_type in ARCHITECTURES:
        family = _own_family(config)  # whose backbone refuses the config, and says why
    else:
        raise InputError(
            f"config.json: model_type {config.model_type!r} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}; others can be merged without "
            "learning (adamerge merge, adamerge fold)"
        )
    if embeds is None:
        return family
    return importlib.import_module("adamerge_jax.models.embedder").embedder_family(family, embeds)
