"""Coefficients of models in memory, from file to merge."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import adamerge_jax as am
from adamerge_jax.report.coefficients import print_coefficients
from adamerge_jax.report.comparison import compare
from tests.own_model.linear import BASE, EXPERTS, TASKS


@pytest.fixture(scope="module")
def file(merged: am.Merged[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged.save(tmp_path_factory.mktemp("merge") / "coefficients.safetensors")


def test_the_file_says_all_that_a_runs_says(file: Path):
    coefficients = am.Coefficients.load(file)
    assert coefficients.names == TASKS
    assert coefficients.base.identity.startswith("sha256:")
    console = Console(record=True, width=120, file=open(file.with_suffix(".txt"), "w"))  # noqa: SIM115
    print_coefficients(coefficients, console)
    assert "in-memory" in console.export_text()
    halved = compare(coefficients, coefficients.times({"law": 0.5}))
    assert halved.experts[0].change > 0 == halved.experts[1].change


def test_arrays_stay_of_their_kind_and_dtype(merged: am.Merged[dict[str, Any]]):
    def narrow(model: Any) -> Any:
        host = jax.tree.map(np.asarray, model)
        kernel = jnp.asarray(model["body"]["kernel"], jnp.bfloat16)
        return host | {"body": host["body"] | {"kernel": kernel}}

    folded = am.fold(
        narrow(BASE),
        {task: narrow(expert) for task, expert in EXPERTS.items()},
        merged.coefficients,
        allow_other_models=True,
    )
    assert folded["body"]["kernel"].dtype == jnp.bfloat16
    assert isinstance(folded["out"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(folded["out"]["kernel"], merged.parameters["out"]["kernel"])


def test_an_expert_that_is_left_out_need_not_be_there(merged: am.Merged[dict[str, Any]]):
    without = merged.coefficients.times({"law": 0})
    alone = am.fold(BASE, {"medicine": EXPERTS["medicine"]}, without)
    both = am.fold(BASE, EXPERTS, without)
    assert (alone["body"]["kernel"] == both["body"]["kernel"]).all()


def test_a_mapping_may_be_in_any_order(merged: am.Merged[dict[str, Any]]):
    turned = dict(reversed(EXPERTS.items()))
    folded = am.fold(BASE, turned, merged.coefficients)
    assert (folded["out"]["kernel"] == merged.parameters["out"]["kernel"]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": [EXPERTS["law"]]}, "experts: there are 1, the coefficients are for 2"),
        ({"experts": {"law": EXPERTS["law"]}}, "experts: 'medicine' is missing"),
        ({"experts": dict(zip(TASKS, reversed(EXPERTS.values()), strict=True))}, "call it 'law'"),
        ({"base": EXPERTS["law"]}, "learned for base"),
        ({"base": {"out": BASE["out"]}}, "experts must have the base's structure"),
        ({"task": "art"}, "task: there is no expert 'art'"),
        ({"coefficients": "no.safetensors"}, "no.safetensors: no such file"),
    ],
)
def test_other_models_are_refused(
    changed: dict[str, Any], message: str, merged: am.Merged[dict[str, Any]]
):
    given = {"base": BASE, "experts": EXPERTS, "coefficients": merged.coefficients}
    with pytest.raises(am.InputError) as caught:
        am.fold(**(given | changed))
    assert message in str(caught.value)


def test_coefficients_for_other_tensors_are_refused(merged: am.Merged[dict[str, Any]]):
    values = {"head.kernel": np.zeros((2, 3), np.float32)}
    shapes = {"head.kernel": (5, 3)}
    wrong = dataclasses.replace(merged.coefficients, values=values, shapes=shapes)
    with pytest.raises(am.InputError, match=r"mix 'head.kernel', which the base does not have"):
        am.fold(BASE, EXPERTS, wrong)


def test_a_report_is_written_anew_but_nothing_else_is_written_over(
    merged: am.Merged[dict[str, Any]], tmp_path: Path
):
    page = merged.report(tmp_path / "report")
    assert "law" in page.read_text() and merged.report(tmp_path / "report") == page
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(am.InputError, match="holds other files than those of a report"):
        merged.report(tmp_path / "mine")


def test_a_notebook_shows_words_and_a_map(merged: am.Merged[dict[str, Any]]):
    step = merged.coefficients.step
    words = f"2 experts, 18 coefficients by column, best after {step} of 20 steps"
    assert words in repr(merged) and len(repr(merged)) < 150
    assert words in (shown := merged._repr_html_()) and "data:image/png;base64," in shown
