"""Numbers and regular expressions of adapters: those that PEFT takes, and those that none can."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from adamerge_jax.checkpoints import patterns
from adamerge_jax.checkpoints.patterns import first_matches
from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, WEIGHTS_FILE
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_base, train

Q_PROJ = "model.layers.0.self_attn.q_proj"
CATASTROPHIC = r"(\w|\w\w|[a-z.0-9_])*!"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with a LLaMA and an adapter of it."""
    root = tmp_path_factory.mktemp("llama")
    base = save_base("llama", root / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    train(AutoModelForCausalLM.from_pretrained(base), root / "adapter", config)
    return root


@pytest.fixture
def adapter(llama, tmp_path) -> Path:
    """A copy of the adapter, to be changed."""
    return Path(shutil.copytree(llama / "adapter", tmp_path / "adapter"))


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def opened(llama: Path, adapter: Path):
    task = {"expert": str(adapter), "calibration": "none"}
    return open_models(parse_recipe({"base": str(llama / "base"), "tasks": {"t": task}}), Path("/"))


def refused(llama: Path, adapter: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_task_vectors(opened(llama, adapter), None)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for part in ("expert 't'", str(adapter), *parts):
        assert part in message, message


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"lora_alpha": alpha}, "lora_alpha of adapter_config.json is")
        for alpha in (float("nan"), float("inf"), -1e39, 10**400, "8", {}, [8], None, True)
    ]
    + [
        ({"alpha_pattern": {"q_proj": alpha}}, "alpha_pattern of adapter_config.json for 'q_proj'")
        for alpha in (float("nan"), 1e39, "x", None)
    ]
    + [
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern of adapter_config.json is ['q_proj']"),
        ({"r": "2"}, "r of adapter_config.json is '2'"),
        ({"r": 4}, "factors of rank 2 for"),
        ({"rank_pattern": {"v_proj": 3}}, "adapter_config.json says 3"),
        ({"alpha_pattern": {"(": 8}}, "'(.*\\\\.)?(()$', which is no regular expression"),
        ({"rank_pattern": {"a{9999999999}": 8}}, "which is no regular expression"),
    ],
)
def test_numbers_and_expressions_that_are_none(llama, adapter, fields, part):
    edit_config(adapter, **fields)
    refused(llama, adapter, part)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_expressions_that_never_end(llama, adapter, monkeypatch, field):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    edit_config(adapter, **{field: {CATASTROPHIC: 2}})
    start = time.monotonic()
    refused(llama, adapter, field, "not done within 0.5 s")
    assert time.monotonic() - start < 5


def test_an_expression_that_never_ends_among_the_targets_is_not_matched(llama, adapter):
    edit_config(adapter, target_modules=CATASTROPHIC)
    assert opened(llama, adapter).experts["t"].factors


def test_the_first_expression_counts_as_in_peft():
    names = ["a.q_proj", "q_proj", "a.xq_proj", "b"]
    expressions = [rf"(.*\.)?({key})$" for key in ("k", "q_proj", r"a\..*", "b{e<=1}")]
    assert first_matches(expressions, names, "here") == [1, 1, 2, None]
    assert first_matches([], names, "here") == [None] * 4


def test_alpha_by_pattern(llama, adapter):
    edit_config(adapter, alpha_pattern={r".*\.1\..*": 8, "q_proj": 6})
    experts = opened(llama, adapter).experts["t"]
    scalings = {name: factors.scaling for name, factors in experts.factors.items()}
    assert scalings[f"{Q_PROJ}.weight"] == 3
    assert scalings[f"{Q_PROJ.replace('.0.', '.1.')}.weight"] == 4
    assert scalings[f"{Q_PROJ.replace('q_', 'v_')}.weight"] == 2


@pytest.mark.parametrize("text", ['{"a":' + "[" * 100_000, "\x00", "[]"])
def test_configs_that_are_no_fields(llama, adapter, text):
    (adapter / CONFIG_FILE).write_text(text)
    refused(llama, adapter, CONFIG_FILE)


def test_products_that_overflow(llama, adapter):
    edit_config(adapter, lora_alpha=3e38)
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({n: array * 100 for n, array in tensors.items()}, adapter / WEIGHTS_FILE)
    refused(llama, adapter, f"{Q_PROJ}.lora_B.weight", "is more than float32 holds")


def test_adapters_without_a_change(llama, adapter):
    save_file({}, adapter / WEIGHTS_FILE)
    refused(llama, adapter, "holds no tensors")


def test_adapters_of_integers(llama, adapter):
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({n: array.astype(np.int8) for n, array in tensors.items()}, adapter / WEIGHTS_FILE)
    refused(llama, adapter, "is stored as int8; expected float32")
