from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.provenance import hub_datasets, model_origins
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.report.model_card import Origin, model_card, shared_license
from adamerge_jax.runs.results import Row
from tests.report.saved_runs import COEFFICIENTS

BASE = Origin("base", "org/base", "v1", True, "mit")
CAT = Origin("cat", "org/cat", None, True, "mit")
DOG = Origin("dog", "experts/dog", None, False, "mit")
ROWS = [Row("base", {"cat": 0.5, "dog": 0.25}), Row("learned (tensor)", {"cat": 0.9, "dog": 0.8})]


def card(*origins: Origin, rows: list[Row] = ROWS, **options) -> ModelCard:
    chosen = dict(datasets=["org/data"], auto_class="AutoModelForImageClassification")
    chosen |= dict(task_folders=["cat", "dog"]) | options
    return ModelCard(model_card(COEFFICIENTS, rows, origins=origins, **chosen))


def test_metadata():
    data = card(BASE, CAT, DOG).data
    assert data.base_model == ["org/base", "org/cat"]  # what is on the Hub
    assert data.get("base_model_relation") == "merge"
    assert data.library_name == "transformers"
    assert data.tags == ["merge", "adamerge_jax"]
    assert data.license == "mit"
    assert data.datasets == ["org/data"]
    assert data.pipeline_tag == "image-classification"


def test_nothing_is_claimed_that_is_not_known():
    local = [own._replace(on_hub=False, license=None) for own in (BASE, CAT, DOG)]
    found = card(*local, rows=[], datasets=[])
    for field in ("base_model", "base_model_relation", "license", "datasets"):
        assert found.data.get(field) is None
    assert "names no licence" in found.text
    assert "Accuracy" not in found.text


@pytest.mark.parametrize(
    ("licenses", "shared"),
    [
        (["mit", "mit", "mit"], "mit"),
        (["mit", "apache-2.0", "mit"], "other"),
        (["mit", None, "mit"], None),
        (["mit", None, "apache-2.0"], None),
    ],
)
def test_licences(licenses, shared):
    origins = [
        own._replace(license=license)
        for own, license in zip((BASE, CAT, DOG), licenses, strict=True)
    ]
    assert shared_license(origins) == shared
    found = card(*origins)
    assert found.data.license == shared
    if shared == "other":
        assert found.data.get("license_name") == "mit-and-apache-2.0"
    for origin in origins:
        assert f"- {origin.name}: {origin.license or 'none named'}" in found.text


def test_the_text():
    text = card(BASE, CAT, DOG).text
    assert "[org/base](https://huggingface.co/org/base) at `v1`" in text
    assert "- dog: `experts/dog`" in text
    assert "| learned (tensor) | 90.0 | 80.0 | 85.0 |" in text
    assert 'from_pretrained("PATH", subfolder="tasks/cat")' in text
    # Of cat: 0.1, 0.2, 0.3, 0.4 in four tensors.
    assert "| cat | 0.250 | 0.112 | 0.100 | 0.400 |" in text
    assert "minimising entropy on examples of org/data" in text


def test_a_language_model():
    found = card(BASE, CAT, DOG, auto_class="AutoModelForCausalLM", task_folders=[])
    assert found.data.pipeline_tag == "text-generation"
    assert "AutoTokenizer" in found.text
    assert "subfolder" not in found.text


def test_licences_come_from_the_models_own_cards(image_recipe, tmp_path):
    tasks = list(image_recipe["tasks"])
    for name, text in {
        "base": "---\nlicense: apache-2.0\n---\n# A base\n",
        tasks[0]: "---\nlicense: other\nlicense_name: my-terms\n---\n",
    }.items():
        old = image_recipe["base"] if name == "base" else image_recipe["tasks"][name]["expert"]
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(old).iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "README.md").write_text(text)
        if name == "base":
            image_recipe["base"] = str(folder)
        else:
            image_recipe["tasks"][name]["expert"] = str(folder)
    origins = model_origins(open_models(parse_recipe(image_recipe), tmp_path), tmp_path)
    assert [own.license for own in origins] == ["apache-2.0", "my-terms", None]
    assert not any(own.on_hub for own in origins)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [a: b\n---\n")
    origins = model_origins(open_models(parse_recipe(image_recipe), tmp_path), tmp_path)
    assert origins[0].license is None


def test_data_sets_of_the_hub(tmp_path):
    (tmp_path / "images").mkdir()
    paths = ["org/b", "org/a", "images", "data.jsonl", "data.npz", "org/a"]
    tasks = {f"t{k}": {"expert": "e", "calibration": path} for k, path in enumerate(paths)}
    recipe = parse_recipe({"base": "b", "tasks": tasks})
    sources = [task.calibration for task in recipe.tasks.values()]
    assert hub_datasets(sources, tmp_path) == ["org/a", "org/b"]
