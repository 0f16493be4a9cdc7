"""Code of somebody's own: what files name runs only where it is allowed, and marked."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.objectives import make_objective
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from adamerge_jax.registry import allow_code
from tests.references import random_coefficients, write_recipe

MODULE = """
from pathlib import Path

from adamerge_jax import extension, granularities, objectives

Path(__file__).with_suffix(".imported").touch()


@extension
def tensor(shapes):
    return granularities.tensor(shapes)


@extension
def nothing(*arguments):
    return 3


@extension
def broken(*arguments):
    raise KeyError("broken")


def unmarked(*arguments):
    Path(__file__).with_suffix(".called").touch()
"""

FIELDS = {
    "granularity": lambda name: {"coefficients": {"granularity": name}},
    "objective": lambda name: {"objectives": [{"name": name}]},
    "regularizer": lambda name: {"regularizers": [{"name": name}]},
    "interference": lambda name: {"interference": [{"name": name}]},
    "method": lambda name: {"evaluation": {"methods": [{"name": name}]}},
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody's own, which leaves a file when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("somebodys", None)
    (tmp_path / "somebodys.py").write_text(MODULE)
    return tmp_path / "somebodys"


def command_fails(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    assert caught.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("command", ["learn", "plan", "fold"])
def test_a_recipe_runs_no_code(kind, command, module, text_recipe, tmp_path, capfd):
    recipe = write_recipe(tmp_path, text_recipe | FIELDS[kind]("somebodys:unmarked"))
    options = {"learn": ["--out", tmp_path / "out"], "plan": [], "fold": ["c", "--out", "o"]}
    error = command_fails(capfd, command, recipe, *options[command])
    assert "'somebodys:unmarked' is code of somebody's own" in error and "--allow-code" in error
    assert not list(tmp_path.glob("somebodys.*ed")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FIELDS)
def test_help_imports_nothing(kind, module, text_recipe, tmp_path, capfd):
    recipe = write_recipe(tmp_path, text_recipe | FIELDS[kind]("somebodys:unmarked"))
    for options in ([], ["--allow-code"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["learn", str(recipe), *options, "--help"])
        assert caught.value.code == 0
    assert not list(tmp_path.glob("somebodys.*ed"))


def test_reading_a_recipe_imports_nothing(module, text_recipe, tmp_path):
    recipe = write_recipe(tmp_path, text_recipe | FIELDS["granularity"]("somebodys:tensor"))
    with pytest.raises(InputError, match=r"recipe.yaml: coefficients.granularity: 'somebodys:t"):
        load_recipe(recipe)
    assert load_recipe(recipe, allow_code=True).own_code == {
        "coefficients.granularity": "somebodys:tensor"
    }
    assert not list(tmp_path.glob("somebodys.*ed"))


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("unmarked", "'somebodys:unmarked' is not marked as an extension"),
        ("Path", "'somebodys:Path' is not marked as an extension"),
        ("nothing", "somebodys:nothing returns int, expected "),
        ("broken", "somebodys:broken says: 'broken'"),
        ("absent", "'somebodys:absent' cannot be imported"),
    ],
)
def test_what_is_allowed_is_looked_at(
    kind, function, message, module, text_recipe, tmp_path, capfd
):
    recipe = write_recipe(tmp_path, text_recipe | FIELDS[kind](f"somebodys:{function}"))
    error = command_fails(capfd, "learn", recipe, "--out", tmp_path / "out", "--allow-code")
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not module.with_suffix(".called").exists()


@pytest.fixture
def evil_file(text_recipe: dict[str, Any], tmp_path: Path) -> Callable[[str], Path]:
    """Writes a coefficients file that names a function of somebody's own."""

    def write(name: str) -> Path:
        models = open_models(parse_recipe(text_recipe), Path("/"))
        coefficients = replace(random_coefficients(models, "tensor"), granularity=name)
        file = tmp_path / "evil.safetensors"
        coefficients.save(file)
        return file

    return write


@pytest.mark.parametrize("name", ["somebodys:tensor", "os:system", "subprocess:Popen"])
def test_a_coefficients_file_runs_no_code(name, evil_file, module, text_recipe, tmp_path, capfd):
    file, other = evil_file(name), tmp_path / "other.safetensors"
    models = open_models(parse_recipe(text_recipe), Path("/"))
    random_coefficients(models, "row").save(other)
    recipe = write_recipe(tmp_path, text_recipe)
    out = tmp_path / "out"
    for command in (
        ["fold", recipe, file, "--out", out],
        # Code may run that the recipe names, which is none.
        ["fold", recipe, file, "--out", out, "--allow-code"],
        ["compare", file, other],
        ["mergekit", recipe, file, "--out", out],
        ["learn", recipe, "--coefficients.start", file, "--out", out, "--allow-code"],
    ):
        error = command_fails(capfd, *command)
        assert f"{name!r} is code of somebody's own" in error, command
    cli.main(["inspect", str(file)])
    assert not list(tmp_path.glob("somebodys.*ed")) and not out.exists()


def test_a_file_is_folded_where_the_recipe_names_its_function(
    evil_file, module, text_recipe, tmp_path, capfd
):
    file = evil_file("somebodys:tensor")
    recipe = write_recipe(tmp_path, text_recipe | FIELDS["granularity"]("somebodys:tensor"))
    out = tmp_path / "out"
    command_fails(capfd, "fold", recipe, file, "--out", out)
    cli.main(["fold", str(recipe), str(file), "--out", str(out), "--allow-code"])
    models = open_models(parse_recipe(text_recipe), Path("/"))
    random_coefficients(models, "tensor").save(file)
    plain = write_recipe(tmp_path, text_recipe)
    cli.main(["fold", str(plain), str(file), "--out", str(tmp_path / "plain")])
    weights = "checkpoint/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_the_method_of_a_command(module, text_recipe, tmp_path, capfd):
    recipe = write_recipe(tmp_path, text_recipe)
    command = ["merge", recipe, "--method", "somebodys:unmarked", "--out", tmp_path / "out"]
    assert "is code of somebody's own" in command_fails(capfd, *command)
    assert not list(tmp_path.glob("somebodys.*ed"))
    assert "is not marked as an extension" in command_fails(capfd, *command, "--allow-code")
    assert not module.with_suffix(".called").exists()


def test_facts_of_a_file_are_checked(text_recipe, tmp_path, capfd):
    models = open_models(parse_recipe(text_recipe), Path("/"))
    sound = random_coefficients(models, "tensor", interference=[FittedStep("trim", {})])
    file = tmp_path / "c.safetensors"
    for fitted in ("garbage", None, [1.0], [float("nan")] * 3, [-1.0] * 3, {"a": 1}):
        damaged = replace(sound.interference[0], fitted=fitted)
        replace(sound, interference=(damaged,)).save(file)
        with pytest.raises(InputError, match=r"trim has no facts of 3 task|cannot be read"):
            Coefficients.load(file)


def test_code_is_allowed_by_name():
    allow_code(["math:floor"])
    with pytest.raises(InputError, match="'math:ceil' is code of somebody's own"):
        make_objective("math:ceil", {})
