"""Three small suites of models, data and a recipe that work: what bad inputs are made of."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import load_recipe
from tests.references import (
    fine_tune,
    random_coefficients,
    randomise,
    save_image,
    write_json_lines,
)

WORDS = [f"w{number}" for number in range(200)]

BERT = dict(
    vocab_size=205,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
LLAMA = dict(
    vocab_size=204,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VIT = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=16,
    patch_size=8,
)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)

EXAMPLES = 24


def save_text(root: Path) -> None:
    """Saves a BERT, its experts `alpha` of 3 and `beta` of 2 classes, and labelled texts."""
    tokenizer = _tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    base = randomise(BertModel(BertConfig(**BERT)))
    _save(base, tokenizer, root / "base")
    for seed, (task, classes) in enumerate({"alpha": 3, "beta": 2}.items(), start=1):
        expert = BertForSequenceClassification(BertConfig(**BERT, num_labels=classes))
        _save(fine_tune(expert, base, seed), tokenizer, root / task)
        rows = [{"text": text, "label": n % classes} for n, text in enumerate(_texts(seed))]
        write_json_lines(root / f"{task}.test.jsonl", rows)
        write_json_lines(root / f"{task}.cal.jsonl", [{"text": row["text"]} for row in rows])
    _save_recipe(root, ("alpha", "beta"), label="label")
    models = open_models(load_recipe(root / "recipe.yaml"), root)
    random_coefficients(models).save(root / "coefficients.safetensors")


def save_language(root: Path) -> None:
    """Saves a Llama, two LoRA adapters `code` and `law` of it, and prompts with responses."""
    tokenizer = _tokenizer(["<pad>", "<s>", "</s>", "<unk>"])
    base = randomise(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    _save(base, tokenizer, root / "base")
    for seed, task in enumerate(("code", "law"), start=1):
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
        )
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.1, generator=generator)
        adapter.save_pretrained(root / task)
        texts = _texts(seed)
        rows = [{"prompt": text, "response": text[:5]} for text in texts]
        write_json_lines(root / f"{task}.cal.jsonl", rows)
        write_json_lines(root / f"{task}.test.jsonl", rows)
    _save_recipe(root, ("code", "law"), label=None)


def save_images(root: Path) -> None:
    """Saves a ViT, its experts `shape` and `colour`, and folders of images named by class."""
    base = randomise(ViTModel(ViTConfig(**VIT), add_pooling_layer=False))
    size = dict(height=16, width=16)
    _save(base, ViTImageProcessorPil(size=size), root / "base")
    generator = np.random.default_rng(0)
    for seed, (task, classes) in enumerate({"shape": 2, "colour": 3}.items(), start=1):
        expert = ViTForImageClassification(ViTConfig(**VIT, num_labels=classes))
        _save(fine_tune(expert, base, seed), ViTImageProcessorPil(size=size), root / task)
        for part in ("cal", "test"):
            for label in range(classes):
                for number in range(EXAMPLES // classes):
                    file = root / f"{task}.{part}" / f"class {label}" / f"{number}.png"
                    save_image(file, generator.integers(0, 256, (16, 16, 3)))
    _save_recipe(root, ("shape", "colour"), label="label", suffix="")


def copy_suite(suite: Path, folder: Path) -> Path:
    """Copies a suite; files are shared with it, so they are replaced and never written into."""
    return shutil.copytree(suite, folder, copy_function=_link)


def replace(file: Path, content: bytes | str) -> None:
    """Writes a file of a copied suite, which the suite itself keeps as it was."""
    file.unlink(missing_ok=True)
    file.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )


def read_recipe(root: Path) -> dict[str, Any]:
    """Returns the fields of a suite's recipe."""
    return yaml.safe_load((root / "recipe.yaml").read_text())


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words; BERT's has its two tokens around a text."""
    tokens = [*special, *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    is_bert = "[CLS]" in vocabulary
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]" if is_bert else "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if is_bert:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
        names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)


def _save(model: PreTrainedModel, preprocessor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    preprocessor.save_pretrained(folder)


def _texts(seed: int) -> list[str]:
    """Draws texts of 3 to 8 words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 9))) for _ in range(EXAMPLES)]


def _save_recipe(
    root: Path, tasks: tuple[str, ...], *, label: str | None, suffix: str = ".jsonl"
) -> None:
    fields = {
        "preset": "adamerging",
        "base": "base",
        "tasks": {
            task: {
                "expert": task,
                "calibration": {"path": f"{task}.cal{suffix}"},
                "test": {"path": f"{task}.test{suffix}"} | ({"label": label} if label else {}),
            }
            for task in tasks
        },
        "max_length": 16,
        "export": {"orbax": False},
        "learning": {"steps": 2, "evaluate_every": 1, "batch_size": 8},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    (root / "recipe.json").write_text(json.dumps(fields))
