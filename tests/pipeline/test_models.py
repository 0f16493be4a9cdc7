"""Opening the base and the experts of a recipe."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline import located
from adamerge_jax.pipeline.located import resolve
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import BERT, edit_weights, fine_tune, randomise


def test_a_pattern_that_fits_nothing(text_recipe):
    fields = text_recipe | {"keep_from_base": ["*.bias", "embeddings.*"]}
    with pytest.raises(InputError, match=r"keep_from_base: 'embeddings\.\*' fits no parameter"):
        open_models(parse_recipe(fields), Path("/"))


@pytest.mark.parametrize("to_run", [True, False])
def test_an_expert_is_located_once(text_recipe, monkeypatch, to_run):
    """On the Hub it is asked for every time."""
    sources = []

    def counted(source, **options):
        sources.append(source)
        return locate(source, **options)

    monkeypatch.setattr(located, "locate", counted)
    recipe = parse_recipe(text_recipe)
    open_models(recipe, Path("/"), read_weights=False, to_run=to_run)
    assert sources == [task.expert.path for task in recipe.tasks.values()]


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_a_pooler_that_no_classifier_reads(tmp_path, kind):
    """As older versions of `transformers` saved it with every RoBERTa and MPNet."""
    sizes = BERT | dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    base = randomise(AutoModel.from_config(AutoConfig.for_model(kind, **sizes)))
    base.save_pretrained(tmp_path / "base")
    config = AutoConfig.for_model(kind, **sizes, num_labels=2)
    expert = fine_tune(AutoModelForSequenceClassification.from_config(config), base, 1)
    expert.save_pretrained(tmp_path / "expert")
    pooler = {
        f"{kind}.pooler.dense.{part}": tensor.detach().numpy()
        for part, tensor in base.pooler.dense.named_parameters()
    }
    edit_weights(tmp_path / "expert", lambda tensors: tensors.update(pooler))
    task = {"expert": str(tmp_path / "expert"), "calibration": "none"}
    fields = {"base": str(tmp_path / "base"), "tasks": {"task": task}}
    opened = open_models(parse_recipe(fields), tmp_path)
    assert not any("pooler" in name for name in opened.experts["task"].names)
    assert opened.base.extra == ("pooler.dense.bias", "pooler.dense.weight")


def test_paths(tmp_path):
    (tmp_path / "base").mkdir()
    assert resolve("base", tmp_path) == str(tmp_path / "base")
    assert resolve("org/base", tmp_path) == "org/base"
    assert resolve(str(tmp_path / "base"), Path("/elsewhere")) == str(tmp_path / "base")


@pytest.mark.parametrize("what", ["base", "expert"])
def test_paths_do_not_start_in_the_current_directory(text_recipe, tmp_path, monkeypatch, what):
    """A folder there is neither what the recipe means nor the Hub's model of that name."""
    root = tmp_path / "root"
    root.mkdir()
    owner = text_recipe if what == "base" else text_recipe["tasks"]["topic"]
    shutil.copytree(owner[what], tmp_path / "org" / "name")
    owner[what] = "org/name"
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(text_recipe)
    role = "base" if what == "base" else "expert 'topic'"
    # Up to the end of the line: the file in hand is noted behind it.
    said = rf"(?m)^{role}: org/name is a folder of .* \({tmp_path}\), .* paths start at {root}\)$"
    with pytest.raises(InputError, match=said):
        open_models(recipe, root)
    open_models(recipe, tmp_path)
    monkeypatch.chdir(root)
    open_models(recipe, Path(".."))
