"""mergekit's YAML files: what they say is what our coefficients say.

With MERGEKIT naming a `mergekit-yaml` (in an environment of its own), it is run on them.
"""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from adamerge_jax.checkpoints.mergekit import read_weights
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.pipeline.export import export_mergekit
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import Recipe
from tests.language_references import language_expert
from tests.references import random_coefficients, randomise, write_recipe

MERGEKIT = os.environ.get("MERGEKIT")

TASKS = ("counting", "naming")

SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)


def save(root: Path, base: PreTrainedModel, **changes: Any) -> Recipe:
    """Saves a base and two experts of it; their recipe."""
    randomise(base).save_pretrained(root / "base")
    for seed, task in enumerate(TASKS, start=1):
        language_expert(base, seed).save_pretrained(root / task)
    tasks = {task: {"expert": str(root / task), "calibration": "unused"} for task in TASKS}
    return parse_recipe({"base": str(root / "base"), "tasks": tasks} | changes)


def llama(root: Path) -> Recipe:
    return save(root, LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)))


def bert(root: Path) -> Recipe:
    """Biases stay the base's, and so does its head."""
    config = BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES)
    return save(root, BertForSequenceClassification(config), keep_from_base=["*.bias"])


LINEAR = {"merge_method": "linear", "base_model": None}
"""Changes of a config that make it an average of the experts alone."""

KINDS = {"llama": llama, "bert": bert}


@pytest.fixture(scope="module", params=KINDS)
def recipe(request, tmp_path_factory) -> Recipe:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def models(recipe) -> Models:
    return open_models(recipe, Path())


@pytest.fixture(scope="module")
def llama_recipe(tmp_path_factory) -> Recipe:
    return llama(tmp_path_factory.mktemp("llama"))


def per_tensor(models: Models, coefficients: Coefficients) -> dict[str, np.ndarray]:
    """The coefficients of every tensor of the base, 0 where none is merged."""
    scales = coefficients.scales()
    return {
        name: np.ravel(scales[name]) if name in scales else np.zeros(len(TASKS))
        for name in models.base.names
    }


@pytest.mark.parametrize("granularity", ["task", "layer", "tensor"])
def test_a_merge_is_read_back_as_it_was_written(recipe, models, granularity, tmp_path):
    coefficients = random_coefficients(models, granularity)
    export_mergekit(models, coefficients, tmp_path / "merge.yaml", recipe.export.dtype)
    read = read_weights(tmp_path / "merge.yaml", models.base, models.experts)
    expected = per_tensor(models, coefficients)
    assert list(read) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values, err_msg=name)


@pytest.mark.skipif(not MERGEKIT, reason="MERGEKIT names no mergekit-yaml")
@pytest.mark.parametrize("granularity", ["task", "layer", "tensor"])
def test_mergekit_makes_the_same_merge(recipe, models, granularity, tmp_path):
    coefficients = random_coefficients(models, granularity)
    export_mergekit(models, coefficients, tmp_path / "merge.yaml", recipe.export.dtype)
    command = [MERGEKIT, "merge.yaml", "merged", "--no-copy-tokenizer"]
    subprocess.run(command, cwd=tmp_path, check=True)
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    ours = dict(fold(models, coefficients))
    largest = max(np.abs(theirs[name] - values).max() for name, values in ours.items())
    print(f"{models.config.model_type}, {granularity}: {largest:.1e}")
    assert largest < 1e-5
    for name in models.base.extra:
        np.testing.assert_array_equal(theirs[name], models.base.checkpoint.read(name))


def test_a_name_within_another_changes_only_its_own(llama_recipe, tmp_path):
    models = open_models(llama_recipe, Path())
    coefficients = random_coefficients(models)
    values = {name: np.zeros(2, np.float32) for name in coefficients.values}
    values["model.norm.weight"] = np.ones(2, np.float32)
    only = Coefficients(**vars(coefficients) | {"values": values})
    export_mergekit(models, only, tmp_path / "merge.yaml", llama_recipe.export.dtype)
    read = read_weights(tmp_path / "merge.yaml", models.base, models.experts)
    assert [name for name, own in read.items() if own.any()] == ["model.norm.weight"]


@pytest.mark.parametrize("doubled", [("base", *TASKS), ("base",), ("naming",), ()])
def test_the_second_copy_of_tied_embeddings_is_weighted_as_the_first(doubled, tmp_path):
    recipe = save(
        tmp_path,
        LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **SIZES)),
    )
    for model in doubled:
        file = tmp_path / model / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    models = open_models(recipe, Path())
    coefficients = random_coefficients(models)
    values = {name: np.ones_like(own) for name, own in coefficients.values.items()}
    values["model.embed_tokens.weight"] = np.array([0.25, 0.5], np.float32)
    coefficients = dataclasses.replace(coefficients, values=values)
    export_mergekit(models, coefficients, tmp_path / "merge.yaml", recipe.export.dtype)
    config = yaml.safe_load((tmp_path / "merge.yaml").read_text())
    tables = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if doubled else set())
    for entry, expected in zip(config["models"], (0.25, 0.5), strict=True):
        *own, usual = entry["parameters"]["weight"]
        assert {each["filter"]: each["value"] for each in own} == dict.fromkeys(tables, expected)
        assert usual == {"value": 1.0}


def write_config(folder: Path, recipe: Recipe, **changes: Any) -> Path:
    """A mergekit config of the recipe's models, as people write them."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": recipe.base.path,
        "models": [
            {"model": task.expert.path, "parameters": {"weight": 0.25 * (1 + position)}}
            for position, task in enumerate(recipe.tasks.values())
        ],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    return file


def weighted(recipe: Recipe, *weights: Any) -> list[dict[str, Any]]:
    """The list of models of a config: the experts with these weights."""
    return [
        {"model": task.expert.path, "parameters": {"weight": weight}}
        for task, weight in zip(recipe.tasks.values(), weights, strict=True)
    ]


def read(file: Path, recipe: Recipe) -> dict[str, np.ndarray]:
    models = open_models(recipe, Path())
    return read_weights(file, models.base, models.experts)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [0.25, 0.5]),
        ({"parameters": {"lambda": 2}}, [0.5, 1.0]),
        ({"parameters": {"normalize": True, "lambda": 1.5}}, [0.5, 1.0]),
        (LINEAR, [1 / 3, 2 / 3]),
    ],
)
def test_what_weights_are_multiplied_and_divided_by(llama_recipe, tmp_path, changes, expected):
    for values in read(write_config(tmp_path, llama_recipe, **changes), llama_recipe).values():
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_linear_with_the_base_among_the_models(llama_recipe, tmp_path):
    models = [{"model": llama_recipe.base.path, "parameters": {"weight": 2}}]
    models += [{"model": t.expert.path} for t in llama_recipe.tasks.values()]
    file = write_config(
        tmp_path,
        llama_recipe,
        merge_method="linear",
        models=models,
        parameters={"weight": 1},
    )
    for values in read(file, llama_recipe).values():
        np.testing.assert_allclose(values, [0.25, 0.25])


@pytest.mark.parametrize(
    "base_model, listed, expected",
    [
        ("base", TASKS, [1 / 3, 1 / 3]),
        ("base", ("base", *TASKS), [1 / 3, 1 / 3]),
        ("counting", TASKS, [1 / 2, 1 / 2]),
        ("counting", ("naming",), [1 / 2, 1 / 2]),
    ],
)
def test_linear_merges_its_base_model_too(llama_recipe, tmp_path, base_model, listed, expected):
    paths = {"base": llama_recipe.base.path}
    paths |= {name: task.expert.path for name, task in llama_recipe.tasks.items()}
    file = write_config(
        tmp_path,
        llama_recipe,
        merge_method="linear",
        base_model=paths[base_model],
        models=[{"model": paths[name]} for name in listed],
        parameters={"weight": 1},
    )
    for values in read(file, llama_recipe).values():
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_filters_and_gradients(llama_recipe, tmp_path):
    one, two = (task.expert.path for task in llama_recipe.tasks.values())
    weight = [
        {"filter": "mlp", "value": [0.0, 1.0]},
        {"filter": "norm", "value": 0.5},
        {"value": 2},
    ]
    models = [
        {"model": one, "parameters": {"weight": weight}},
        {"model": two, "parameters": {"weight": [0.0, 0.2, 1.0]}},
    ]
    found = read(write_config(tmp_path, llama_recipe, models=models), llama_recipe)
    expected = {
        "model.embed_tokens.weight": [2, 0],
        "model.layers.0.mlp.up_proj.weight": [0, 0],
        "model.layers.1.mlp.up_proj.weight": [0.5, 0.2],
        "model.layers.2.mlp.up_proj.weight": [1, 1],
        "model.layers.1.input_layernorm.weight": [0.5, 0.2],
        "model.norm.weight": [0.5, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"merge_method": "ties"}, "merge_method is 'ties'"),
        ({"models": None, "slices": []}, "has no list of models"),
        ({"base_model": "other/base"}, "base_model is 'other/base', the base is"),
        ({"models": [{"model": "other/expert"}]}, "models.0 is 'other/expert', which is neither"),
        ({"models": []}, "has no model for expert 'counting'"),
        (
            {"parameters": {"lambda": {"a": 1}}},
            "parameters.lambda: .* is no number, list of numbers or list of filters",
        ),
        ({"parameters": {"lambda": float("nan")}}, "parameters.lambda: nan is not finite"),
        ({"parameters": {"lambda": [{"filter": 0, "value": 1}]}}, "lambda: filter is 0; write"),
        ({"parameters": 3}, "config.yaml: parameters is 3; write names with values"),
        ({"merge_method": "linear"}, "linear merges base_model too, and it has no weight"),
        (
            {"merge_method": "linear", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
            r"base has no weight for lm_head\.weight",
        ),
        (LINEAR | {"base_model": "other/base"}, "base_model is 'other/base', which is neither"),
        (
            LINEAR | {"parameters": {"normalize": False}},
            "the weights of .* sum to 0.75; without normalize only",
        ),
    ],
)
def test_configs_that_are_no_coefficients(llama_recipe, tmp_path, changes, match):
    file = write_config(tmp_path, llama_recipe, **changes)
    with pytest.raises(InputError, match=match) as caught:
        read(file, llama_recipe)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("method", [{}, LINEAR])
@pytest.mark.parametrize(
    "weight",
    [
        *(float("nan"), float("inf"), "nan", [1.0, float("inf")], [{"value": float("nan")}]),
        *(1e39, -1e39, "1e39", 10**400, [0, 10**400], [{"value": 2e38 * 2}]),
    ],
)
def test_weights_that_are_not_finite(llama_recipe, tmp_path, method, weight):
    models = weighted(llama_recipe, 1, weight)
    file = write_config(tmp_path, llama_recipe, models=models, **method)
    with pytest.raises(
        InputError, match=r"weight of naming: .* is not finite|is too long for a number"
    ):
        read(file, llama_recipe)


@pytest.mark.parametrize("scale", [3e38, 10**38])
def test_weights_whose_products_are_not_finite(llama_recipe, tmp_path, scale):
    models = weighted(llama_recipe, 1, 2)
    file = write_config(tmp_path, llama_recipe, models=models, parameters={"lambda": scale * 1.0})
    with pytest.raises(InputError, match=r"the weights of \S+ are .* finite in float32"):
        read(file, llama_recipe)


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (0.1, -0.1 + 1e-9)])
def test_linear_with_weights_that_sum_to_nothing(llama_recipe, tmp_path, weights):
    models = weighted(llama_recipe, *weights)
    file = write_config(tmp_path, llama_recipe, models=models, **LINEAR)
    with pytest.raises(InputError, match=r"weights of \S+ sum to .* linear divides by"):
        read(file, llama_recipe)


@pytest.mark.parametrize(
    "parameters, match",
    [
        (1, "models.0.parameters is 1; write names with values"),
        (0, "models.0.parameters is 0; write names with values"),
        (["weight"], r"models.0.parameters is \['weight'\]; write names with values"),
        ({"weight": [{"filter": 0, "value": 1}]}, "weight of counting: filter is 0; write a part"),
        ({"weight": None}, "weight of counting: None is no number, list of numbers or list"),
    ],
)
def test_parameters_of_a_model_that_are_none(llama_recipe, tmp_path, parameters, match):
    models = weighted(llama_recipe, 1, 1)
    models[0]["parameters"] = parameters
    with pytest.raises(InputError, match=match):
        read(write_config(tmp_path, llama_recipe, models=models), llama_recipe)


@pytest.mark.parametrize("method", [{}, LINEAR])
def test_a_model_with_a_lora(llama_recipe, tmp_path, method):
    models = weighted(llama_recipe, 1, 1)
    path = models[0]["model"]
    models[0]["model"] = {"model": {"path": path}, "lora": {"path": "some/lora"}}
    file = write_config(tmp_path, llama_recipe, models=models, **method)
    with pytest.raises(InputError, match=r"config\.yaml: the model .*some/lora.* has a lora"):
        read(file, llama_recipe)
    # One that is none is none.
    models[0]["model"]["lora"] = None
    file = write_config(tmp_path, llama_recipe, models=models, **method)
    assert read(file, llama_recipe)


def test_a_lora_behind_a_revision(llama_recipe, tmp_path):
    opened = open_models(llama_recipe, Path())
    one = opened.experts["counting"]
    on_hub = dataclasses.replace(one.checkpoint, source="some/expert")
    experts = opened.experts | {"counting": dataclasses.replace(one, checkpoint=on_hub)}
    models = weighted(llama_recipe, 1, 1)
    models[0]["model"] = "some/expert@main"
    file = write_config(tmp_path, llama_recipe, models=models)
    assert read_weights(file, opened.base, experts)
    models[0]["model"] = "some/expert@main+some/lora"
    file = write_config(tmp_path, llama_recipe, models=models)
    with pytest.raises(InputError, match=r"models.0 is 'some/expert@main\+some/lora', which is"):
        read_weights(file, opened.base, experts)


@pytest.mark.parametrize("role", ["base", *TASKS])
def test_a_model_that_is_listed_twice(llama_recipe, tmp_path, role):
    models = weighted(llama_recipe, 1, 1)
    paths = {"base": llama_recipe.base.path} | dict(
        zip(TASKS, (entry["model"] for entry in models), strict=True)
    )
    models = [{"model": paths["base"]}, *models, {"model": {"model": {"path": paths[role]}}}]
    file = write_config(tmp_path, llama_recipe, models=models)
    with pytest.raises(InputError, match=r"models.3 is .*, which is in the list already"):
        read(file, llama_recipe)


@pytest.mark.parametrize("text", [None, "a: [", "- 1", "base: x"])
def test_files_that_are_no_configs(llama_recipe, tmp_path, text):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(
        InputError, match=r"config\.yaml(: cannot be read|: not valid YAML| is no mergekit config)"
    ):
        read(file, llama_recipe)


@pytest.mark.parametrize(
    "granularity, interference, match",
    [
        ("row", (), "granularity 'row' are finer than tensors"),
        ("tensor", (FittedStep("elect_sign", {}),), "it has interference steps"),
    ],
)
def test_merges_that_mergekit_cannot_make(llama_recipe, tmp_path, granularity, interference, match):
    models = open_models(llama_recipe, Path())
    coefficients = random_coefficients(models, granularity, interference)
    with pytest.raises(InputError, match=f"mergekit cannot make this merge: .*{match}"):
        export_mergekit(models, coefficients, tmp_path / "merge.yaml", llama_recipe.export.dtype)
    assert not list(tmp_path.iterdir())


def test_models_with_unlike_tensors(text_recipe, tmp_path):
    recipe = parse_recipe(text_recipe)
    models = open_models(recipe, Path())
    with pytest.raises(InputError, match=r"base .* has no tensor 'bert\.embeddings"):
        export_mergekit(
            models, random_coefficients(models), tmp_path / "merge.yaml", recipe.export.dtype
        )


def test_the_command(llama_recipe, tmp_path, capsys):
    fields = llama_recipe.model_dump(mode="json")
    file = write_recipe(tmp_path, fields)
    models = open_models(llama_recipe, Path())
    random_coefficients(models).save(tmp_path / "coefficients.safetensors")
    # Options in any order: of two YAML files, the recipe is the one that is no option's.
    out = tmp_path / "merge.yaml"
    command = ["mergekit", "--out", str(out), str(file), str(tmp_path / "coefficients.safetensors")]
    cli.main([*command, "--export.dtype", "bfloat16"])
    assert str(out) in capsys.readouterr().out
    config = yaml.safe_load(out.read_text())
    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "merge.yaml exists" in capsys.readouterr().err
