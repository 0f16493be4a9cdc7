"""The config files and assets of an export: copied from the models, changed where the merge did."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import train
from tests.language_references import byte_tokenizer, language_expert
from tests.older_transformers import logits_of, token_ids
from tests.references import bert_tokenizer, fine_tune, randomise, save_image_merge

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=400
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

OLDER_PYTHON = os.environ.get("TRANSFORMERS_4_PYTHON")
"""A Python with version 4 of `transformers`; CONTRIBUTING.md says how to make it."""


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def change(file: Path, **fields: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    changed = (read(file) if file.exists() else {}) | fields
    present = {name: value for name, value in changed.items() if value is not None}
    file.write_text(json.dumps(present))


def as_version_4(folder: Path) -> None:
    """Writes a Llama's config.json as version 4 of `transformers` does."""
    rotary = dict(read(folder / "config.json")["rope_parameters"])
    theta = rotary.pop("rope_theta")
    change(
        folder / "config.json",
        rope_parameters=None,
        dtype=None,
        torch_dtype="float32",
        rope_theta=theta,
        rope_scaling=rotary if rotary["rope_type"] != "default" else None,
        transformers_version="4.46.0",
    )


def save_family(root: Path, base: PreTrainedModel) -> dict[str, Any]:
    """Saves a language model and two experts, without tokenizers; returns a recipe's fields."""
    randomise(base).save_pretrained(root / "base")
    for seed, task in enumerate(("one", "two"), start=1):
        language_expert(base, seed).save_pretrained(root / task)
    return {
        "base": str(root / "base"),
        "tasks": {
            task: {"expert": str(root / task), "calibration": "none"} for task in ("one", "two")
        },
    }


def export(fields: dict[str, Any], out: Path) -> Path:
    """Merges by the plain average; returns the folder of the checkpoint."""
    recipe = parse_recipe({"export": {"orbax": False}} | fields)
    merge(recipe, "average", {}, root=Path("/"), out=out, console=Console(quiet=True))
    return out / "checkpoint"


@pytest.fixture
def chat(tmp_path):
    """A base with a plain end token in the dialect of version 4, and chat experts with another."""
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    fields = save_family(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)))
    for name, end in (("base", "</s>"), ("one", "<|end|>"), ("two", "<|end|>")):
        as_version_4(tmp_path / name)
        tokenizer = byte_tokenizer(eos_token=end)
        tokenizer.save_pretrained(tmp_path / name)
        end_id = tokenizer.convert_tokens_to_ids(end)
        change(tmp_path / name / "config.json", bos_token_id=1, eos_token_id=end_id)
    change(tmp_path / "base" / "generation_config.json", eos_token_id=2, max_new_tokens=2048)
    change(tmp_path / "one" / "generation_config.json", eos_token_id=[5, 2], temperature=0.6)
    return fields


def test_the_file_of_the_base_is_copied(tmp_path, chat):
    """Fields that this version of `transformers` does not write, or not so, survive."""
    change(tmp_path / "base" / "config.json", mine={"a": [1]}, rope_scaling=LLAMA3)
    for task in ("one", "two"):
        change(tmp_path / task / "config.json", rope_scaling=LLAMA3)
    before = read(tmp_path / "base" / "config.json")
    for dtype in (None, "bfloat16"):
        settings = {"export": {"orbax": False, "dtype": dtype}}
        out = export(chat | {"tokenizer": "base"} | settings, tmp_path / f"out-{dtype}")
        assert read(out / "config.json") == before | {"torch_dtype": dtype or "float32"}
        assert read(out / "generation_config.json")["max_new_tokens"] == 2048


def test_special_tokens_come_with_the_tokenizer(tmp_path, chat):
    before = read(tmp_path / "base" / "config.json")
    out = export(chat | {"tokenizer": "one"}, tmp_path / "out")
    assert read(out / "config.json") == before | {"eos_token_id": 5}
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 5
    # Two ends of the expert's own, one of them the tokenizer's.
    generation = read(out / "generation_config.json")
    assert (generation["eos_token_id"], generation["temperature"]) == ([5, 2], 0.6)
    # Without settings of its own it has the base's, with its end.
    (tmp_path / "one" / "generation_config.json").unlink()
    out = export(chat | {"tokenizer": "one"}, tmp_path / "again")
    generation = read(out / "generation_config.json")
    assert (generation["eos_token_id"], generation["max_new_tokens"]) == (5, 2048)


def test_special_tokens_of_an_expert_whose_config_is_still_the_base_s(tmp_path, chat):
    change(tmp_path / "one" / "config.json", eos_token_id=2)
    out = export(chat | {"tokenizer": "one"}, tmp_path / "out")
    assert read(out / "config.json")["eos_token_id"] == 5


def test_special_tokens_of_an_adapter(tmp_path, chat):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for seed, task in enumerate(("one", "two")):
        shutil.rmtree(tmp_path / task)
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        train(base, tmp_path / task, lora, seed).unload()
    byte_tokenizer(eos_token="<|end|>").save_pretrained(tmp_path / "one")
    out = export(chat | {"tokenizer": "one"}, tmp_path / "out")
    assert read(out / "config.json")["eos_token_id"] == 5
    assert read(out / "generation_config.json")["eos_token_id"] == 5


def test_what_described_the_old_weights_is_gone(tmp_path, chat):
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name in ("base", "one"):
        change(tmp_path / name / "config.json", quantization_config=quantized, _name_or_path="/me")
    out = export(chat, tmp_path / "out")
    assert not {"quantization_config", "_name_or_path"} & read(out / "config.json").keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight.dtype == torch.float32


def test_python_files_do_not_travel(tmp_path, chat):
    """Nor what a config says of them: `from_pretrained` would look for the file."""
    change(
        tmp_path / "base" / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"},
        architectures=["TinyForCausalLM"],
    )
    change(
        tmp_path / "base" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tiny.Tiny", "tiny.Tiny"]},
    )
    for name in ("modeling_tiny.py", "tiny.py", "chat_template.py"):
        (tmp_path / "base" / name).write_text("raise RuntimeError")
    out = export(chat | {"tokenizer": "base"}, tmp_path / "out")
    assert not list(out.rglob("*.py"))
    assert not any("auto_map" in read(file) for file in out.glob("*config.json"))
    assert read(out / "config.json")["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == byte_tokenizer().get_vocab()


def test_a_base_saved_without_its_output_layer(tmp_path):
    """The merge has the names of a model that has one, and engines go by the class."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    fields = save_family(tmp_path, LlamaForCausalLM(config))
    LlamaForCausalLM.from_pretrained(tmp_path / "base").model.save_pretrained(tmp_path / "base")
    assert read(tmp_path / "base" / "config.json")["architectures"] == ["LlamaModel"]
    out = export(fields, tmp_path / "out")
    assert read(out / "config.json")["architectures"] == ["LlamaForCausalLM"]
    _, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


# Classifiers


@pytest.fixture
def classifiers(tmp_path):
    """A BERT with a head of its own and two experts with others."""
    base = randomise(BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)))
    base.save_pretrained(tmp_path / "base")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "base")
    change(tmp_path / "base" / "config.json", problem_type="regression", mine=1)
    tasks = {}
    for seed, (task, names) in enumerate((("tone", ["bad", "good"]), ("topic", ["a", "b", "c"]))):
        labels = dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        expert = BertForSequenceClassification(BertConfig(**SIZES, **labels))
        fine_tune(expert, base.bert, seed).save_pretrained(tmp_path / task)
        tasks[task] = {"expert": str(tmp_path / task), "calibration": "none"}
    return {"base": str(tmp_path / "base"), "tasks": tasks}


def test_each_task_has_the_config_of_its_head(tmp_path, classifiers):
    change(tmp_path / "tone" / "config.json", quantization_config={"bits": 4}, theirs="x")
    before = read(tmp_path / "tone" / "config.json")
    del before["quantization_config"]
    out = export(classifiers, tmp_path / "out")
    assert read(out / "tasks" / "tone" / "config.json") == before
    of_merge = read(out / "config.json")
    assert of_merge["architectures"] == ["BertModel"] and of_merge["mine"] == 1
    # They described the base's head, which no task has.
    assert not {"id2label", "label2id", "problem_type"} & of_merge.keys()


def test_each_adapter_has_the_config_of_its_head(tmp_path, classifiers):
    for seed, (task, classes) in enumerate((("tone", 2), ("topic", 3))):
        shutil.rmtree(tmp_path / task)
        change(tmp_path / "base" / "config.json", problem_type=None)
        model = BertForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=classes, ignore_mismatched_sizes=True
        )
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        train(model, tmp_path / task, lora, seed)
    out = export(classifiers, tmp_path / "out")
    fields = read(out / "tasks" / "topic" / "config.json")
    assert fields["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert fields["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert fields["architectures"] == ["BertForSequenceClassification"] and fields["mine"] == 1
    loaded = BertForSequenceClassification.from_pretrained(out / "tasks" / "topic")
    assert loaded.num_labels == 3


def test_a_tokenizer_class_in_a_python_file_does_not_travel(tmp_path, classifiers):
    """A plain tokenizer is read in its place, before the merge and after it."""
    change(
        tmp_path / "base" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
    )
    (tmp_path / "base" / "evil.py").write_text("raise RuntimeError")
    here = AutoTokenizer.from_pretrained(tmp_path / "base", trust_remote_code=False)
    out = export(classifiers, tmp_path / "out")
    there = AutoTokenizer.from_pretrained(out)
    assert there.get_vocab() == here.get_vocab() and type(there) is type(here)
    assert not list(out.rglob("*.py"))


def test_all_files_of_a_tokenizer_travel(tmp_path):
    """A PhoBERT's class is named by its config.json alone, and reads files that others have not."""
    root = tmp_path / "models"
    sizes = SIZES | dict(vocab_size=40, max_position_embeddings=40)
    base = randomise(RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False))
    base.save_pretrained(root / "base")
    for seed, task in enumerate(("one", "two")):
        expert = RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=2))
        fine_tune(expert, base, seed).save_pretrained(root / task)
    travels = {
        "vocab.txt": "".join(f"{letter} 1\n" for letter in "abcdefgh"),
        "bpe.codes": "a b 2\n",
        "added_tokens.json": "{}",
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "chat_template.json": '{"chat_template": "{{ messages }}"}',
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "spiece.model": "\0",
    }
    stays = ["training_args.bin", "notes.txt", "vocab.py", "additional_chat_templates/run.py"]
    for task in ("one", "two"):
        for name, text in {**travels, **dict.fromkeys(stays, "")}.items():
            (root / task / name).parent.mkdir(exist_ok=True)
            (root / task / name).write_text(text)
        change(root / task / "config.json", tokenizer_class="PhobertTokenizer")
    tasks = {task: {"expert": str(root / task), "calibration": "none"} for task in ("one", "two")}
    out = export({"base": str(root / "base"), "tasks": tasks}, tmp_path / "out")
    assert read(out / "config.json")["tokenizer_class"] == "PhobertTokenizer"
    for folder in (out, out / "tasks" / "one"):
        small = {
            str(file.relative_to(folder)): file.read_text()
            for file in folder.rglob("*")
            if file.is_file()
            and not file.name.startswith(("model", "config", "README"))
            and "tasks" not in file.relative_to(folder).parts
        }
        assert small == travels


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "generation_config.json"])
def test_a_link_out_of_its_folder_is_not_copied(tmp_path, classifiers, name):
    secret = tmp_path / "secret"
    secret.write_text('{"token": "hf_abc"}')
    (tmp_path / "base" / name).unlink(missing_ok=True)
    (tmp_path / "base" / name).symlink_to(secret)
    with pytest.raises(InputError, match=rf"base/{name} is a link to .*secret, outside of its"):
        export(classifiers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_s_cache_are_copied(tmp_path, classifiers):
    """There every file of a snapshot is a link to a blob."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "base").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    out = export(classifiers | {"base": str(snapshot)}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    assert not any(file.is_symlink() for file in out.rglob("*"))


# Another major version of transformers


def save_bert(root: Path) -> dict[str, Any]:
    base = randomise(BertForSequenceClassification(BertConfig(**SIZES))).bert
    base.save_pretrained(root / "base")
    bert_tokenizer(root).save_pretrained(root / "base")
    tasks = {}
    for classes in (2, 3):
        expert = BertForSequenceClassification(BertConfig(**SIZES, num_labels=classes))
        fine_tune(expert, base, classes).save_pretrained(root / f"of-{classes}")
        tasks[f"of-{classes}"] = {"expert": str(root / f"of-{classes}"), "calibration": "none"}
    return {"base": str(root / "base"), "tasks": tasks}


def save_llama(root: Path, *, old: bool, rope: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    rope = rope | {"rope_theta": 500_000.0}
    config = LlamaConfig(**SIZES | sizes, rope_parameters=rope, num_key_value_heads=1)
    fields = save_family(root, LlamaForCausalLM(config))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(root / "base")
    for name in ("base", "one", "two") if old else ():
        as_version_4(root / name)
    return fields


def save_t5(root: Path) -> dict[str, Any]:
    """A T5 1.1, whose output layer `transformers` 5 does not make by itself."""
    config = T5Config(
        vocab_size=400,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    return save_family(root, model)


PLAIN = {"rope_type": "default"}
EXPORTS = {
    "llama of version 4": lambda root: save_llama(root, old=True, rope=PLAIN),
    "llama of version 5": lambda root: save_llama(root, old=False, rope=PLAIN),
    "llama 3.1 of version 4": lambda root: save_llama(root, old=True, rope=LLAMA3),
    "llama 3.1 of version 5": lambda root: save_llama(root, old=False, rope=LLAMA3),
    "tied llama": lambda root: save_llama(
        root, old=True, rope=PLAIN, tie_word_embeddings=True, head_dim=12
    ),
    "gemma3": lambda root: save_family(
        root,
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SIZES,
                num_key_value_heads=1,
                head_dim=8,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={
                    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=2e6),
                    "sliding_attention": dict(rope_type="default", rope_theta=2e4),
                },
            )
        ),
    ),
    "t5 with a layer of outputs": save_t5,
    "bert": save_bert,
    "vit": save_image_merge,
}


@pytest.mark.skipif(OLDER_PYTHON is None, reason="TRANSFORMERS_4_PYTHON names no Python")
def test_two_major_versions_read_the_same_model(tmp_path):
    """Up to the order of float32 sums: both run the same PyTorch."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 400, (2, 24)).tolist()
    inputs_of = {
        "t5 with a layer of outputs": {"input_ids": tokens, "decoder_input_ids": tokens},
        "vit": {"pixel_values": generator.normal(size=(2, 3, 8, 8)).tolist()},
    }
    jobs = []
    for name, save in EXPORTS.items():
        (tmp_path / name).mkdir()
        folder = export(save(tmp_path / name), tmp_path / name / "out")
        for number, model in enumerate(sorted(folder.glob("tasks/*")) or [folder]):
            job = {
                "folder": str(model),
                "model_class": read(model / "config.json")["architectures"][0],
                "inputs": inputs_of.get(name, {"input_ids": tokens}),
                "out": str(tmp_path / f"{name}-{number}.npy"),
            }
            has_tokenizer = (model / "tokenizer.json").exists()
            jobs.append(job | ({"text": "the red fox <|end|>"} if has_tokenizer else {}))
    assert len(jobs) == len(EXPORTS) + 2  # two classifiers have two tasks
    assert sum("text" in job for job in jobs) == 7  # all Llamas, and both models of a BERT
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parents[1] / "older_transformers.py"
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [OLDER_PYTHON, script, tmp_path / "jobs.json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4.")
    for job in jobs:
        expected = logits_of(job["folder"], job["model_class"], job["inputs"])
        assert expected.std() > 1e-3
        if "text" in job:
            ids = json.loads(Path(job["out"] + ".ids").read_text())
            assert ids == token_ids(job["folder"], job["text"]), job["folder"]
        difference = np.abs(np.load(job["out"]) - expected).max()
        print(f"{Path(job['out']).stem}: {difference:.1e}")
        assert difference <= 1e-5 * np.abs(expected).max(), job["folder"]
