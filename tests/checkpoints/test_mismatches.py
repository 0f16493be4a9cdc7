"""Checkpoints that do not match the base as they are: each is read, or named for what it is."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, WEIGHTS_FILE
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.located import resolve
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_base, train
from tests.references import edit_weights, randomise, rename_weights

Q_PROJ = "model.layers.0.self_attn.q_proj"


def opened(base: Path, expert: Path | str, root: Path = Path("/")) -> Models:
    fields = {"base": str(base), "tasks": {"t": {"expert": str(expert), "calibration": "none"}}}
    return open_models(parse_recipe(fields), root)


def refused(base: Path, expert: Path | str, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(base, expert)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("expert 't'", *parts):
        assert part in message, message


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with a LLaMA as base, an expert of it, and an adapter."""
    root = tmp_path_factory.mktemp("llama")
    base = save_base("llama", root / "base")
    expert = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.5)
    expert.save_pretrained(root / "expert")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(AutoModelForCausalLM.from_pretrained(base), root / "adapter", config)
    return root


@pytest.fixture
def expert(llama, tmp_path) -> Path:
    """A copy of the expert, to be changed."""
    return Path(shutil.copytree(llama / "expert", tmp_path / "expert"))


@pytest.fixture
def adapter(llama, tmp_path) -> Path:
    """A copy of the adapter, to be changed."""
    return Path(shutil.copytree(llama / "adapter", tmp_path / "adapter"))


# Wrappers


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "base_model.model.", "_forward_module."),
        *("module._orig_mod.", "_orig_mod.module.", "model.module.model."),
    ],
)
def test_prefixes_of_wrappers_are_taken_off(llama, expert, prefix):
    rename_weights(expert, lambda name: prefix + name)
    wrapped, plain = opened(llama / "base", expert), opened(llama / "base", llama / "expert")
    for name in plain.base.names:
        np.testing.assert_array_equal(
            wrapped.experts["t"].read(name), plain.experts["t"].read(name)
        )
    # Its identity is that of the same weights without the wrapper.
    assert wrapped.sources[1].identity == plain.sources[1].identity


def test_marks_of_wrapped_modules_are_taken_off(llama, expert):
    rename_weights(expert, lambda name: name.replace("self_attn", "_orig_mod.self_attn"))
    assert opened(llama / "base", expert).experts["t"].read(f"{Q_PROJ}.weight").any()


def test_a_wrapped_base_is_exported_without_the_wrapper(llama, tmp_path):
    base = Path(shutil.copytree(llama / "base", tmp_path / "base"))
    rename_weights(base, lambda name: f"module.{name}")
    models = opened(base, llama / "expert")
    assert models.prefix == ""
    assert (
        models.base.checkpoint.tensors.keys()
        == opened(llama / "base", llama / "expert").base.checkpoint.tensors.keys()
    )


def test_a_prefix_that_not_all_have_stays(llama, expert):
    rename_weights(expert, lambda name: name if "norm" in name else f"module.{name}")
    refused(llama / "base", expert, "lacks ", "has tensors called module.")


def test_wrappers_around_an_adapter(llama, adapter):
    tensors = load_file(adapter / WEIGHTS_FILE)
    for rename in (
        lambda name: f"module.{name}",
        lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
        lambda name: name.replace("_A.weight", "_A.default.weight").replace(
            "_B.weight", "_B.default.weight"
        ),
    ):
        save_file({rename(name): array for name, array in tensors.items()}, adapter / WEIGHTS_FILE)
        factors = opened(llama / "base", adapter).experts["t"].low_rank(f"{Q_PROJ}.weight")
        np.testing.assert_array_equal(
            factors.right, tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"]
        )


# Weights that are no parameters


@pytest.mark.parametrize(
    "added, method, kind",
    [
        ("weight.absmax", "bitsandbytes", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", None, "bitsandbytes, 4 bit"),
        ("SCB", None, "bitsandbytes, 8 bit"),
        ("qweight", "gptq", "GPTQ"),
        ("qweight", "awq", "AWQ"),
        ("g_idx", None, "GPTQ"),
        ("weight_packed", "compressed-tensors", "compressed-tensors"),
        ("weight_scale_inv", "fp8", "8-bit floating point"),
    ],
)
def test_quantised_experts(llama, expert, added, method, kind):
    edit_weights(
        expert,
        lambda tensors: (
            tensors.update({f"{Q_PROJ}.{added}": np.ones((4, 4), np.uint8)}),
            tensors.pop(f"{Q_PROJ}.weight"),
        ),
    )
    if method:
        config = json.loads((expert / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (expert / "config.json").write_text(json.dumps(config))
    refused(llama / "base", expert, f"is quantised ({kind}", added, "quantised from", "dequantize")


def test_integers_in_place_of_weights(llama, expert):
    edit_weights(
        expert,
        lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].astype(np.int8)}),
    )
    refused(llama / "base", expert, "is quantised (integers", "stored as int8")


def test_a_config_left_over_from_a_quantised_model_is_no_fault(llama, expert):
    config = json.loads((expert / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (expert / "config.json").write_text(json.dumps(config))
    assert opened(llama / "base", expert).experts["t"].read(f"{Q_PROJ}.weight").any()


@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_tensors_that_other_processes_had(llama, expert, adapter, shape):
    empty = np.zeros(shape, np.float32)
    edit_weights(expert, lambda tensors: tensors.update({f"{Q_PROJ}.weight": empty}))
    refused(llama / "base", expert, f"no values in {Q_PROJ}.weight", "ZeRO-3", "zero_to_fp32")
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file(dict.fromkeys(tensors, empty), adapter / WEIGHTS_FILE)
    refused(llama / "base", adapter, "no values in", "ZeRO-3")


def test_a_peft_model_that_was_not_merged(llama, expert):
    rename_weights(expert, lambda name: name.replace("q_proj.", "q_proj.base_layer."))
    refused(llama / "base", expert, "a PEFT model that was not merged", "merge_and_unload()")


# Folders


@pytest.mark.parametrize("kind", ["expert", "adapter"])
@pytest.mark.parametrize(
    "inside, parts",
    [
        (["checkpoint-500"], ["checkpoints of a training run", "checkpoint-500"]),
        (["checkpoint-90", "checkpoint-500"], ["checkpoint-500 or ", "checkpoint-90"]),
        (["final"], ["a subfolder has; give the folder to merge", "final"]),
        (["snapshots/0123abc"], ["the Hub's cache of org/law; give org/law", "snapshots/0123abc"]),
    ],
)
def test_models_in_subfolders_are_named(llama, tmp_path, kind, inside, parts):
    folder = tmp_path / "models--org--law"
    for name in inside:
        shutil.copytree(llama / kind, folder / name)
    refused(llama / "base", folder, *parts)
    # The folder that the message names is one.
    assert opened(llama / "base", folder / inside[0])


def test_a_model_beside_its_checkpoints_is_read(llama, expert):
    shutil.copytree(llama / "base", expert / "checkpoint-500")
    assert opened(llama / "base", expert)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "~nobody-of-this-name/x"])
def test_paths_of_no_folder(tmp_path, path):
    with pytest.raises(InputError, match="cannot be a folder") as caught:
        resolve(path, tmp_path)
    assert "\0" not in str(caught.value)


# Tied tables


@pytest.mark.parametrize("second", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_table_of_t5_under_another_name(tmp_path, second):
    base = save_base("t5", tmp_path / "base")
    expert = Path(shutil.copytree(base, tmp_path / "expert"))
    edit_weights(expert, lambda t: t.update({second: t.pop("shared.weight") + 1}))
    models = opened(base, expert)
    table = models.base.read("shared.weight")
    np.testing.assert_array_equal(models.experts["t"].read("shared.weight"), table + 1)


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("roberta", "lm_head.decoder.weight"),
        ("electra", "generator_lm_head.weight"),
        ("mpnet", "lm_head.decoder.weight"),
    ],
)
def test_the_table_of_an_encoder_under_the_name_of_its_output_layer(tmp_path, kind, second):
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=24, max_position_embeddings=20)
    config = AutoConfig.for_model(kind, **sizes)
    randomise(AutoModel.from_config(config)).save_pretrained(tmp_path / "base")
    expert = AutoModelForSequenceClassification.from_config(config)
    randomise(expert, 1).save_pretrained(tmp_path / "expert")
    table = "embeddings.word_embeddings.weight"
    expected = load_file(tmp_path / "base" / "model.safetensors")[table]
    edit_weights(tmp_path / "base", lambda t: t.update({second: t.pop(table)}))
    models = opened(tmp_path / "base", tmp_path / "expert")
    np.testing.assert_array_equal(models.base.read(f"{kind}.{table}"), expected)


def test_a_config_that_lacks_the_number_of_classes(tmp_path):
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = RobertaConfig(**sizes, intermediate_size=24, max_position_embeddings=20, num_labels=3)
    randomise(RobertaModel(config)).save_pretrained(tmp_path / "base")
    expert = tmp_path / "expert"
    randomise(RobertaForSequenceClassification(config), 1).save_pretrained(expert)
    fields = json.loads((expert / "config.json").read_text())
    del fields["id2label"], fields["label2id"]
    (expert / "config.json").write_text(json.dumps(fields))
    refused(tmp_path / "base", expert, "has 3 classes by classifier.", "and 2 by its config.json")


def test_tied_tables_of_a_llama_under_the_name_of_the_output_layer(tmp_path):
    base = save_base("tied", tmp_path / "base")
    expert = Path(shutil.copytree(base, tmp_path / "expert"))
    table = "model.embed_tokens.weight"
    edit_weights(expert, lambda t: t.update({"lm_head.weight": t.pop(table) * 2}))
    models = opened(base, expert)
    np.testing.assert_array_equal(models.experts["t"].read(table), models.base.read(table) * 2)


def test_tied_tables_of_a_gpt_neox_under_the_name_of_its_output_layer(tmp_path):
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = GPTNeoXConfig(**sizes, intermediate_size=24, tie_word_embeddings=True)
    base, expert = tmp_path / "base", tmp_path / "expert"
    randomise(GPTNeoXForCausalLM(config)).save_pretrained(base)
    shutil.copytree(base, expert)
    table, output = "gpt_neox.embed_in.weight", "embed_out.weight"
    edit_weights(expert, lambda t: t.update({output: t.pop(table) * 2}))
    models = opened(base, expert)
    np.testing.assert_array_equal(models.experts["t"].read(table), models.base.read(table) * 2)
    edit_weights(expert, lambda t: t.update({table: t[output] + 1}))
    refused(base, expert, f"has an {output} that differs from {table}")


# Warnings


def warnings_of(caplog, open_all: Callable[[], object]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "adamerge_jax"):
        open_all()
    return [record.getMessage() for record in caplog.records]


def test_an_adapter_of_another_base(llama, adapter, caplog):
    file = adapter / CONFIG_FILE
    config = json.loads(file.read_text())
    for name, warned in (
        ("other/model", True),
        ("/elsewhere/BASE/", False),
        ("org/base", False),
        ("C:\\models\\base", False),
        ("/cache/models--org--base/snapshots/0123", False),
        ("/cache/models--org--other/snapshots/0123", True),
        ("", False),
        (None, False),
        (3, False),
    ):
        file.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        messages = warnings_of(caplog, lambda: opened(llama / "base", adapter))
        assert len(messages) == warned, name
        if warned:
            assert f"trained on {name} (base_model_name_or_path)" in messages[0]
            assert str(llama / "base") in messages[0] and "\n" not in messages[0]


def test_an_adapter_that_was_not_trained(llama, adapter, caplog):
    assert not warnings_of(caplog, lambda: opened(llama / "base", adapter))
    tensors = load_file(adapter / WEIGHTS_FILE)
    zeros = {name: array * ("lora_A" in name) for name, array in tensors.items()}
    save_file(zeros, adapter / WEIGHTS_FILE)
    (message,) = warnings_of(caplog, lambda: opened(llama / "base", adapter))
    assert "untrained: every B factor is 0" in message and "expert 't'" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_expert_that_is_the_base(llama, expert, caplog, dtype):
    assert not warnings_of(caplog, lambda: opened(llama / "base", expert))
    weights = load_file(llama / "base" / "model.safetensors")
    halves = {name: array.astype(dtype) for name, array in weights.items()}
    save_file(halves, expert / "model.safetensors", metadata={"format": "pt"})
    (message,) = warnings_of(caplog, lambda: opened(llama / "base", expert))
    assert "has the base's weights in all that is merged" in message
    # A single entry behind the beginning of one tensor is a difference.
    halves["lm_head.weight"][-1, -1] += 1
    save_file(halves, expert / "model.safetensors", metadata={"format": "pt"})
    assert not warnings_of(caplog, lambda: opened(llama / "base", expert))
