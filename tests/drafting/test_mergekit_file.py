"""A mergekit file becomes a recipe and the method that makes its merge, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adamerge_jax.cli import main as cli
from adamerge_jax.drafting.mergekit_file import read_mergekit_file
from adamerge_jax.errors import InputError
from adamerge_jax.methods import make_method
from adamerge_jax.recipes.loading import load_recipe


def config(method: str, *parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    own = parameters or ({"weight": 0.5}, {"weight": 0.5})
    models = [{"model": f"org/{n}", "parameters": p} for n, p in zip("ab", own, strict=True)]
    return {"merge_method": method, "base_model": "org/base", "models": models} | fields


def read(folder: Path, fields: Any):
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(fields))
    return read_mergekit_file(file)


SHARES = ({"weight": 1, "density": 0.25},) * 2
LISTED = [{"model": "org/base", "parameters": {"weight": 2}}] + config("linear")["models"]


@pytest.mark.parametrize(
    ("fields", "method", "options"),
    [
        (config("task_arithmetic"), "task_arithmetic", {"coefficient": 0.5}),
        (config("task_arithmetic", {}, {}, parameters={"weight": 0.5, "lambda": 0.4}),
         "task_arithmetic", {"coefficient": 0.2}),
        (config("task_arithmetic", parameters={"normalize": True}),
         "task_arithmetic", {"coefficient": 0.5}),
        (config("task_arithmetic", {}, {}, parameters={"weight": 0, "normalize": True}),
         "task_arithmetic", {"coefficient": 0.0}),
        (config("task_arithmetic", parameters={"lambda": None}),
         "task_arithmetic", {"coefficient": 0.5}),
        (config("task_arithmetic", {"weight": "5e-1"}, {"weight": "5e-1"}),  # as YAML 1.1 reads it
         "task_arithmetic", {"coefficient": 0.5}),
        (config("linear", models=LISTED), "task_arithmetic", {"coefficient": 0.5 / 3}),
        (config("ties", *SHARES), "ties", {"coefficient": 1.0, "density": 0.25}),
        (config("dare_linear", *SHARES, parameters={"lambda": 0.5}),
         "dare", {"coefficient": 0.5, "drop": 0.75}),
        (config("breadcrumbs", *SHARES, parameters={"gamma": 0.05}),
         "breadcrumbs", {"coefficient": 1.0, "smallest": 0.7, "largest": 0.05}),
        (config("ties", *SHARES, parameters={"lambda": None}),
         "ties", {"coefficient": 1.0, "density": 0.25}),
        (config("sce", {}, {}, parameters={"select_topk": 0.1}), "sce", {"density": 0.1}),
    ],
)  # fmt: skip
def test_the_method_and_its_options(
    fields: dict[str, Any], method: str, options: dict[str, float], tmp_path: Path
):
    merge = read(tmp_path, fields)
    assert (merge.base, merge.experts) == ("org/base", ["org/a", "org/b"])
    assert merge.method == method
    assert merge.options == pytest.approx(options)
    make_method(merge.method, merge.options)


@pytest.mark.parametrize("weight", [0.7, [0.1, 0.9], [{"filter": "mlp", "value": 1}]])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_weights_that_differ_are_what_learning_starts_from(method, weight, tmp_path: Path):
    merge = read(tmp_path, config(method, {"weight": 0.5}, {"weight": weight}))
    assert merge.method is None
    assert "learning starts from them" in merge.notes[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([], "no merge_method"),
        (config("slerp"), "these are read: task_arithmetic"),
        (config({"a": 1}), "these are read"),
        (config("dare_ties"), "drop_and_rescale and elect_sign"),
        (config("ties", {"weight": 1, "density": 0.2}, {"weight": 1, "density": 0.3}), "density"),
        (config("ties", {"weight": 1}, {"weight": [1, 2]}), "differs by tensor"),
        (config("ties", parameters={"normalize": False}), "normalize"),
        (config("ties", parameters={"normalize": "yes"}), "true or false"),
        (config("dare_linear", parameters={"rescale": False}), "rescale"),
        (config("breadcrumbs", parameters={"normalize": True}), "normalize"),
        (config("linear"), "base_model too"),
        (config("linear", {"weight": 1}, {"weight": 1}, parameters={"weight": -2}), "sum to 0"),
        (config("task_arithmetic", {}, {}), "has no weight"),
        (config("ties", {"weight": "x"}, {"weight": "x"}), "expected a number"),
        (config("ties", {"weight": float("nan")}, {"weight": 1}), "finite"),
        (config("ties", base_model=None), "names no base_model"),
        (config("ties", models=None, slices=[]), "no list of models"),
        (config("ties", models=[{"model": "org/base"}]), "no model but base_model"),
        (config("ties", models=[{"model": "org/a"}] * 2), "already"),
        (config("ties", models=["org/a"]), "expected model: PATH"),
        (config("ties", models=[{"model": "org/other+org/a"}]), "adapter of another model"),
        (config("ties", parameters=[1]), "expected names with values"),
        (config("ties", dtype="float8"), "expected one of float32"),
    ],
)
def test_others_are_refused(fields: Any, reason: str, tmp_path: Path):
    with pytest.raises(InputError, match=rf"merge\.yaml.*{reason}"):
        read(tmp_path, fields)


def test_adapters_and_revisions_are_named_as_here(tmp_path: Path):
    models = [
        {"model": "org/base+org/adapter", "parameters": {"weight": 1}},
        {"model": {"model": {"path": "org/b", "revision": "v1"}}, "parameters": {"weight": 1}},
    ]
    merge = read(tmp_path, config("ties", models=models, tokenizer_source="union"))
    assert merge.experts == ["org/adapter", "org/b@v1"]
    assert "not taken over: tokenizer_source" in merge.notes


@pytest.mark.parametrize("weights", [(0.4, 0.4, 0.4), (0.4, 0.2, 0.4)])
def test_the_command_that_it_prints_can_be_typed(
    weights, text_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "merge.yaml"
    models = [
        {"model": task["expert"], "parameters": {"weight": weight}}
        for task, weight in zip(text_fields["tasks"].values(), weights, strict=True)
    ]
    fields = {"merge_method": "task_arithmetic", "base_model": text_fields["base"]}
    file.write_text(yaml.safe_dump(fields | {"models": models, "dtype": "bfloat16"}))
    out = tmp_path / "recipe.yaml"
    cli.main(["from-mergekit", str(file), "--out", str(out)])
    printed = capsys.readouterr().out
    recipe = load_recipe(out)
    assert list(recipe.tasks) == list(text_fields["tasks"])
    assert recipe.export.dtype == "bfloat16"
    if len(set(weights)) == 1:
        options = "'{coefficient: 0.4}'"
        command = f"adamerge merge {out} --method task_arithmetic --options {options} --out merged"
        assert f"next    {command}\n" in printed
    else:
        assert recipe.coefficients.start == str(file)
        assert f"next    adamerge learn {out}\n" in printed
