"""The JSON schema accepts what the loader accepts, and refuses what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.files.strict_yaml import read_yaml, read_yaml_file
from adamerge_jax.quickstart import recipe_text
from adamerge_jax.recipes.json_schema import recipe_schema
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.presets import PRESETS

ROOT = Path(__file__).parents[2]
SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

TASK = {"expert": "law", "calibration": "law.jsonl"}
MINIMAL: dict[str, Any] = {"base": "base", "tasks": {"law": TASK}}


def recipes() -> dict[str, Any]:
    """Returns all recipes of the repository: files, those in docs, and the quickstart's."""
    found = {"quickstart": read_yaml(recipe_text(0))}
    found |= {f"preset {name}": MINIMAL | PRESETS[name] for name in PRESETS}
    for file in sorted((ROOT / "experiments" / "recipes").glob("*.yaml")):
        found[file.name] = read_yaml_file(file)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
        for number, block in enumerate(blocks):
            fields = yaml.safe_load(block)
            # A part of a recipe is completed; other kinds of YAML have none of its fields.
            if isinstance(fields, dict) and fields.keys() <= SCHEMA["properties"].keys():
                found[f"{page.name} {number}"] = MINIMAL | fields
    return found


RECIPES = recipes()


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert len(RECIPES) > 35


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_repository_is_accepted(name: str):
    VALIDATOR.validate(RECIPES[name])


def test_a_recipe_with_all_defaults_filled_in_is_accepted():
    # As a run folder has it.
    filled_in = parse_recipe(MINIMAL | {"heads": "refitted"}).model_dump(mode="json")
    VALIDATOR.validate(filled_in)


def of_task(**fields: Any) -> dict[str, Any]:
    return {"tasks": {"law": TASK | fields}}


@pytest.mark.parametrize(
    "fields",
    [
        {"base": {"path": "org/name", "revision": "main"}},
        {"heads": "learned"},
        {"heads": {"kind": "learned", "ridge": 0.5}},
        {"retain": "none"},
        {"retain": None},
        {"retain": "general.jsonl"},
        {"retain": {"weight": 0}},
        of_task(test="none", validation=None),
        of_task(test={"path": "t.jsonl", "text": ["first", "second"], "label": "score"}),
        of_task(expert={"path": "law", "revision": "v1"}, class_names=["a", "b"]),
        {"image_size": 224},
        {"image_size": [224, 128]},
        {"search": {"bounds": [0, 1.5]}, "front": {"bounds": [0, 1]}},
        {"coefficients": {"initial": "auto", "constraint": "free"}},
        {"coefficients": {"initial_merge": {"name": "ties"}, "initial": 0}},
        {"coefficients": {"coarse": "none", "initial_merge": "none"}},
        {"coefficients": {"granularity": "mixture_expert"}},
        {"objectives": [{"name": "entropy", "weight": {"law": -1}}]},
        {"interference": [{"name": "trim", "options": {"density": 0.2}}]},
        {"regularizers": [{"name": "distance", "weight": 0.1}]},
        {"evaluation": {"methods": [{"name": "ties", "options": {"density": 0.2}}]}},
        {"tracking": ["wandb"], "learning": {"optimizer": {"schedule": None}}},
    ],
    ids=str,
)
def test_what_the_loader_accepts_is_accepted(fields: dict[str, Any]):
    parse_recipe(MINIMAL | fields)
    VALIDATOR.validate(MINIMAL | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"lerning": {}},
        {"learning": {"step": 1}},
        {"learning": {"optimizer": {"lr": 1}}},
        {"retain": {"pth": "a"}},
        {"heads": "refited"},
        {"heads": {"king": "kept"}},
        of_task(exprt="law"),
        of_task(test={"path": "a", "lable": "b"}),
        of_task(test={"text": "no path"}),
        {"tasks": {}},
        {"tasks": {"law": {"calibration": "law.jsonl"}}},
        {"preset": "recomended"},
        {"learning": {"steps": 0}},
        {"learning": {"steps": True}},
        {"learning": {"held_out": 1}},
        {"coefficients": {"granularity": "rows"}},
        {"coefficients": {"granularity": 3}},
        {"coefficients": {"constraint": "box"}},
        {"coefficients": {"initial": 1e7}},
        {"objectives": []},
        {"objectives": "entropy"},
        {"objectives": [{"name": "entrpy"}]},
        {"evaluation": {"methods": [{"name": "tys"}]}},
        {"image_size": [1, 2, 3]},
        {"max_length": 1},
        {"seed": -1},
        {"export": "none"},
    ],
    ids=str,
)
def test_what_the_loader_refuses_is_refused(fields: dict[str, Any]):
    with pytest.raises(InputError):
        parse_recipe(MINIMAL | fields)
    assert not VALIDATOR.is_valid(MINIMAL | fields)


def test_a_function_of_ones_own_is_accepted():
    own = {"coefficients": {"granularity": "package.module:function"}}
    VALIDATOR.validate(MINIMAL | own)


def test_the_file_beside_our_recipes_is_the_command_s(capsys):
    cli.main(["schema"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == SCHEMA
    file = ROOT / "experiments" / "recipes" / "recipe.schema.json"
    assert file.read_text() == printed, f"write it anew: adamerge schema > {file.relative_to(ROOT)}"
    for recipe in file.parent.glob("*.yaml"):
        assert recipe.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
