"""Rows of baselines that another run with the same models and data need not measure."""

import copy
import dataclasses
import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from adamerge_jax.evaluation.evaluator import Evaluator
from adamerge_jax.evaluation.problem_scores import Scorer
from adamerge_jax.files.caches import keep_in_cache
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.pipeline import row_cache
from adamerge_jax.pipeline.baselines import baseline_rows
from adamerge_jax.pipeline.learn import LearningInputs
from adamerge_jax.pipeline.row_cache import FOLDER, RowCache, RowFacts
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import EvaluationRecipe
from adamerge_jax.runs.rows import Row
from tests.references import learning_inputs

ALIGNED = {"objectives": [{"name": "logit_alignment"}], "heads": "refitted"}
ALL = ["base", "base", "experts", "average", "average", "task arithmetic", "task arithmetic"]
QUICK = ["experts", "task arithmetic", "task arithmetic"]


def inputs_of(fields: dict[str, Any], root: Path, **changes: Any) -> LearningInputs:
    return learning_inputs(parse_recipe(fields | ALIGNED | changes), root)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adamerge_jax" / FOLDER


@pytest.fixture
def evaluated(monkeypatch) -> list[str]:
    """The tasks whose examples models are run on, one for each batch."""
    tasks, run = [], Evaluator._apply_head

    def counted(evaluator: Evaluator, parameters: Any, task: str, outputs: Any) -> Any:
        tasks.append(task)
        return run(evaluator, parameters, task, outputs)

    monkeypatch.setattr(Evaluator, "_apply_head", counted)
    return tasks


def table(inputs: LearningInputs, **settings: Any) -> list[Row]:
    return baseline_rows(inputs, EvaluationRecipe(**settings), cache=RowCache.of(inputs))


def require_same_rows(rows: list[Row], others: list[Row]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row[:4] == other[:4]
        for task, scores in row.examples.items():
            np.testing.assert_array_equal(scores.values, other.examples[task].values)
            np.testing.assert_array_equal(scores.counts, other.examples[task].counts)


def starts(rows: list[Row], expected: list[str]) -> bool:
    pairs = zip(rows, expected, strict=True)
    return all(row.method.startswith(name) for row, name in pairs)


def test_rows_are_measured_once(image_recipe, tmp_path, cache, evaluated):
    inputs = inputs_of(image_recipe, tmp_path)
    evaluated.clear()
    rows = table(inputs)
    assert starts(rows, ALL)
    assert evaluated
    evaluated.clear()
    require_same_rows(table(inputs), rows)
    assert starts(table(inputs, baselines="quick"), QUICK)
    assert table(inputs, baselines="none") == []
    assert not evaluated
    # Another model, other data and other settings are measured for themselves.
    kept = len(list(cache.iterdir()))
    weights = next(Path(image_recipe["base"]).glob("*.safetensors"))
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    table(inputs_of(image_recipe, tmp_path), baselines="quick")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(list(cache.iterdir())) == kept + 2


def test_all_that_decides_on_rows_tells_them_apart(image_recipe, tmp_path, cache, monkeypatch):
    inputs = inputs_of(image_recipe, tmp_path)
    rows = table(inputs, baselines="quick")[:1]
    facts = RowFacts([rows[0].method], [rows[0].kind], {}, False)
    # Heads of language models are empty, and do not tell tasks apart.
    inputs = with_workspace(inputs, heads={task: {} for task in inputs.workspace.heads})
    RowCache(inputs).keep(facts, rows)

    def is_there(inputs: LearningInputs) -> bool:
        return RowCache(inputs).find(facts) is not None

    assert is_there(inputs)
    models = inputs.workspace.models
    swapped = dict(zip(reversed(models.experts), models.experts.values(), strict=True))
    assert not is_there(with_workspace(inputs, models=dataclasses.replace(models, experts=swapped)))
    for attribute, value in [
        ("_scorers", {"shape": Scorer(("entity_f1",), lambda *arguments: {}, ("O", "B-a"))}),
        ("_embeds", EmbeddingForm("cls", normalised=True)),
    ]:
        evaluator = copy.copy(inputs.workspace.evaluator)
        setattr(evaluator, attribute, value)
        assert not is_there(with_workspace(inputs, evaluator=evaluator))
    with jax.default_matmul_precision("bfloat16"):
        assert not is_there(inputs)
    for package in ("transformers", "torch", "torchax"):
        with monkeypatch.context() as patch:
            patch.setattr(row_cache, "version", partial(other_version, package))
            assert not is_there(inputs)
    assert is_there(inputs)


def other_version(changed: str, package: str) -> str:
    return "0" if package == changed else version(package)


def test_files_are_as_large_as_their_bytes(image_recipe, tmp_path, cache, monkeypatch):
    """A file that is too large to be read is not written, whatever letters it has."""
    inputs = inputs_of(image_recipe, tmp_path)
    method = "é" * 3000  # two bytes each
    rows = [table(inputs, baselines="quick")[0]._replace(method=method)]
    facts = RowFacts([method], [rows[0].kind], {}, False)
    monkeypatch.setattr(row_cache, "LARGEST_FILE", 5000)
    before = set(cache.rglob("*.json"))
    RowCache(inputs).keep(facts, rows)
    assert set(cache.rglob("*.json")) == before


def with_workspace(inputs: LearningInputs, **changes: Any) -> LearningInputs:
    return inputs._replace(workspace=inputs.workspace._replace(**changes))


def test_a_cache_folder_that_cannot_be_read_is_no_hindrance(
    image_recipe, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))  # too long for a name
    inputs = inputs_of(image_recipe, tmp_path)
    assert starts(table(inputs, baselines="quick"), QUICK)
    assert "cannot keep the rows" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields["rows"][0]["examples"]["digits"].update(classes=[2**40]),
        lambda fields: fields["rows"][0]["examples"]["digits"]["values"].append(1.0),
        lambda fields: fields["rows"][0]["row"].update(method="[link=evil]base"),
        lambda fields: fields["rows"][0]["row"].update(kind="learned"),
        lambda fields: fields.update(rows=[]),
        lambda fields: fields.update(code="import os"),
        lambda fields: fields.update(facts="0" * 64),
    ],
)
def test_what_was_not_written_there_is_measured(
    image_recipe, tmp_path, cache, evaluated, caplog, damage
):
    inputs = inputs_of(image_recipe, tmp_path)
    rows = table(inputs, baselines="quick")
    task = next(iter(image_recipe["tasks"]))
    for file in cache.iterdir():
        fields = json.loads(file.read_text().replace(f'"{task}"', '"digits"'))
        damage(fields)
        file.write_text(json.dumps(fields).replace('"digits"', f'"{task}"'))
    evaluated.clear()
    require_same_rows(table(inputs, baselines="quick"), rows)
    assert evaluated
    assert "evaluated again" in caplog.text


def test_the_oldest_files_make_room(tmp_path):
    for number in range(4):
        keep_in_cache(tmp_path / f"{number}.json", "x" * 40, 100)
        os.utime(tmp_path / f"{number}.json", ns=(number, number))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2.json", "3.json"]
