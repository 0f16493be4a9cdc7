"""Mixtures of experts from files to files: learned, merged, and opened by `transformers`."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from tests.language_references import TASKS, byte_tokenizer, save_models, split_sentences
from tests.references import (
    LAMBDA,
    merge_by_task_arithmetic,
    parameters_of,
    require_sum,
    write_json_lines,
    write_recipe,
)

EXPERTS = 8
SIZES = dict(
    vocab_size=len(byte_tokenizer()),
    hidden_size=16,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def weights(folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model.safetensors")


def save_recipe(root: Path) -> dict[str, Any]:
    """A Qwen3-MoE of random parameters with eight experts, and two fine-tunes with texts."""
    fields = save_models(root, Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)), byte_tokenizer())
    tasks = {}
    for seed, task in enumerate(TASKS[:2]):
        rows = [
            {"prompt": prompt, "response": response}
            for prompt, response in split_sentences(8, seed)
        ]
        file = write_json_lines(root / f"{task}.jsonl", rows)
        data = {"path": str(file), "end_of_text": "append"}
        tasks[task] = fields["tasks"][task] | {"calibration": data}
    return fields | {"tasks": tasks, "export": {"orbax": False}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_recipe(tmp_path_factory.mktemp("mixture"))


def fused(folder: str, copy: Path) -> str:
    """Saves a model as `transformers` keeps it, the experts of each layer in two stacks."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder)
    model.save_pretrained(copy, save_original_format=False)
    shape = (EXPERTS, 2 * SIZES["moe_intermediate_size"], SIZES["hidden_size"])
    assert weights(copy)["model.layers.1.mlp.experts.gate_up_proj"].shape == shape
    byte_tokenizer().save_pretrained(copy)
    return str(copy)


@pytest.fixture(scope="module")
def learned(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `adamerge learn`, with a fine-tune whose experts are stacked."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = copy.deepcopy(recipe)
    task = recipe["tasks"][TASKS[1]]
    task["expert"] = fused(task["expert"], folder / "fused")
    learning = {"steps": 2, "batch_size": 4, "optimizer": {"learning_rate": 0.02}}
    fields = recipe | {
        "preset": "adamerging",
        "objectives": [{"name": "cross_entropy"}],
        "learning": learning,
    }
    cli.main(["learn", str(write_recipe(folder, fields)), "--out", str(folder / "run")])
    return folder / "run"


def require_sums(
    folder: Path, fields: Mapping[str, Any], coefficients: Mapping[str, np.ndarray]
) -> None:
    """The checkpoint is `theta + sum lambda tau` by float64, for every tensor of every expert."""
    base, merged = weights(fields["base"]), weights(folder)
    experts = [weights(task["expert"]) for task in fields["tasks"].values()]
    assert merged.keys() == base.keys()
    for name, array in merged.items():
        tensors, scales = [expert[name] for expert in experts], coefficients[name].reshape(-1)
        require_sum(array, base[name], tensors, scales, rtol=0, atol=1e-6, name=name)


def test_each_expert_of_a_mixture_has_coefficients_of_its_own(learned, recipe):
    values = Coefficients.load(learned / "coefficients.safetensors").values
    assert values.keys() == weights(recipe["base"]).keys()
    of_experts = [values[name] for name in values if ".experts." in name]
    assert len(of_experts) == SIZES["num_hidden_layers"] * EXPERTS * 3
    assert len({array.tobytes() for array in of_experts}) > len(of_experts) / 2
    require_sums(learned / "checkpoint", recipe, values)


def test_transformers_computes_and_writes_what_we_do(learned):
    model, info = AutoModelForCausalLM.from_pretrained(
        learned / "checkpoint", output_loading_info=True
    )
    assert type(model) is Qwen3MoeForCausalLM
    assert not any(info.values())
    token_ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(token_ids)).logits.numpy()
    family = family_of(model.config)
    backbone, head = family.build_backbone(model.config), family.build_head(model.config)
    parameters = parameters_of(backbone, weights(learned / "checkpoint"))
    batch = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
    outputs = jax.jit(backbone)(parameters, batch)
    logits = head(complete_head(head, {}, parameters), outputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    prompt = torch.from_numpy(token_ids[:, :4])
    written = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (2, 7)


def test_a_method_without_data_of_a_base_whose_experts_are_stacked(recipe, tmp_path, capsys):
    fields = recipe | {"base": fused(recipe["base"], tmp_path / "fused")}
    file, out = write_recipe(tmp_path, fields), tmp_path / "out"
    checkpoint = merge_by_task_arithmetic(file, out)
    scales = dict.fromkeys(weights(recipe["base"]), np.full(2, LAMBDA))
    require_sums(checkpoint, recipe, scales)
    read = f"base: experts of its mixtures are read one by one from {2 * 2} stacks"
    assert read in " ".join(capsys.readouterr().out.split())
    assert read in (out / "checkpoint" / "README.md").read_text()
