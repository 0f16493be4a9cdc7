"""LoRA adapters made by PEFT, and the same experts built out by it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tests.references import EXPORT, randomise

_SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
BERT = dict(vocab_size=40, max_position_embeddings=48, **_SIZES)
LLAMA = dict(vocab_size=40, max_position_embeddings=48, num_key_value_heads=1, **_SIZES)
_VIT = dict(image_size=8, patch_size=4, **_SIZES)
_T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)

Adapters = Mapping[str, Mapping[str, Any]]
"""Options of `LoraConfig` by task."""

PLAIN: Adapters = {
    "one": dict(r=2, lora_alpha=4, target_modules="all-linear"),
    "two": dict(r=3, lora_alpha=4, use_rslora=True, target_modules=r".*(q|v|query|value|q_proj)"),
    "three": dict(r=2, target_modules="all-linear", rank_pattern={r".*\.1\..*": 1}),
}
"""Adapters of unlike ranks, not all of the same modules."""


def save_base(kind: str, folder: Path) -> Path:
    """Saves a tiny random base of a kind, such as `bert`; `tied` is a LLaMA with tied tables."""
    towers = dict(text_config=BERT, vision_config=_VIT)
    base = {
        "bert": lambda: BertModel(BertConfig(**BERT)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "vit": lambda: ViTModel(ViTConfig(**_VIT), add_pooling_layer=False),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**_VIT, use_swiglu_ffn=True)),
        "clip": lambda: CLIPModel(CLIPConfig(**towers, projection_dim=8)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5, decoder_start_token_id=0)),
    }[kind]()
    randomise(base).save_pretrained(folder)
    return folder


def load_model(kind: str, base: Path, classes: int = 3) -> PreTrainedModel:
    """The base with the head that a task's model of its kind has."""
    loaders = {
        "bert": lambda: AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=classes
        ),
        "vit": lambda: AutoModelForImageClassification.from_pretrained(base, num_labels=classes),
        "dinov2": lambda: AutoModelForImageClassification.from_pretrained(base, num_labels=classes),
        "clip": lambda: CLIPModel.from_pretrained(base),
        "t5": lambda: AutoModelForSeq2SeqLM.from_pretrained(base),
    }
    return loaders.get(kind, lambda: AutoModelForCausalLM.from_pretrained(base))().eval()


def train(
    model: PreTrainedModel, folder: Path, config: PeftConfig, seed: int = 0, amount: float = 0.2
) -> PeftModel:
    """Saves an adapter with everything that is trainable changed a little.

    Biases of keys excepted: they cancel in the softmax of attention, so that their gradient is
    rounding noise.
    """
    torch.manual_seed(seed)  # What factors start with.
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and not name.endswith("key.bias"):
                parameter.add_(torch.randn(parameter.shape), alpha=amount)
    adapted.save_pretrained(folder)
    return adapted


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for words of one letter, for a `llama`."""
    words = {
        token: index for index, token in enumerate(["<unk>", "</s>", *map(chr, range(97, 123))])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def save_experts(
    kind: str, root: Path, adapters: Adapters = PLAIN
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Saves a base, an adapter for each task, and the models that PEFT makes of them.

    Returns:
        The fields `base`, `tasks` and `export` of a recipe with the adapters, and of one with the
        whole models. The tasks have no data.
    """
    base = root / "base" if (root / "base").exists() else save_base(kind, root / "base")
    fields = {"adapters": {}, "whole": {}}
    task_types = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "tied": "CAUSAL_LM"}
    for seed, (task, options) in enumerate(adapters.items(), start=1):
        options = dict(options)
        if kind in ("vit", "dinov2"):
            options.setdefault("modules_to_save", ["classifier"])
            if options["target_modules"] == "all-linear":
                options["exclude_modules"] = ["classifier"]
        config = LoraConfig(task_type=task_types.get(kind), **options)
        adapted = train(load_model(kind, base), root / "adapters" / task, config, seed)
        adapted.merge_and_unload().save_pretrained(root / "whole" / task)
        for form, tasks in fields.items():
            tasks[task] = {"expert": str(root / form / task), "calibration": "none"}
    return tuple(
        {"base": str(base), "tasks": tasks, "export": dict(EXPORT)} for tasks in fields.values()
    )
