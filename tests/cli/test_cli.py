import importlib.metadata
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import adamerge_jax
from adamerge_jax.cli import main as cli
from adamerge_jax.cli.compilation import keep_compiled_programs
from adamerge_jax.errors import InputError
from tests.references import write_recipe


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert not caught.value.code
    printed = capsys.readouterr().out
    for name in cli.COMMANDS if arguments in ([], ["--help"]) else [f"adamerge {arguments[0]}"]:
        assert name in printed


def test_help_shows_the_recipe_as_defaults(text_recipe, tmp_path, capsys):
    text_recipe["learning"]["steps"] = 1234
    recipe = write_recipe(tmp_path, text_recipe)
    with pytest.raises(SystemExit) as caught:
        cli.main(["learn", str(recipe), "--help"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert "--learning.steps" in printed
    assert "Number of optimizer steps" in printed
    assert "1234" in printed


def help_of(*arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments])
    assert not caught.value.code
    return capsys.readouterr().out


def test_help_shows_what_matters_and_help_all_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, long = (help_of("learn", o, capsys=capsys) for o in ("--help", "--help-all"))
    assert short.count("\n") < 100 < 300 < long.count("\n")
    for option in ("--out", "--preset", "--learning.steps", "--export.dtype"):
        assert option in short and option in long
    for option in ("--learning.microbatches", "--tasks.TASK.test.path", "--devices.model"):
        assert option not in short
    assert "--learning.microbatches" in long and "--devices.model" in long
    assert "adamerge learn --help-all" in " ".join(short.split())
    assert help_of("inspect", "--help-all", capsys=capsys) == help_of(
        "inspect", "-h", capsys=capsys
    )


def test_no_line_of_help_is_torn(capsys, monkeypatch):
    """Lines end where the terminal does, not where those of the source do."""
    monkeypatch.setenv("COLUMNS", "80")
    printed = help_of("learn", "--help", capsys=capsys)
    assert "expert-merging++, self-positioning" in printed


def test_a_reader_that_goes_away_is_no_fault(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as closed, pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(sys, "stdout", closed)
        cli.main(["learn", "--help-all"])
    assert caught.value.code == 141
    assert capsys.readouterr().err == ""


def test_a_shell_completes_commands_and_options(tmp_path, capsys):
    script = tmp_path / "adamerge"
    script.write_text(help_of("--completion", "bash", capsys=capsys))
    asked = """
        source "$1"
        complete -p adamerge
        COMP_WORDS=(adamerge coa) COMP_CWORD=1
        $(complete -p adamerge | sed 's/.*-F \\([^ ]*\\).*/\\1/') adamerge coa adamerge
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", asked, "bash", str(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["coarsen"]
    with pytest.raises(SystemExit):
        cli.main(["--completion", "bush"])
    assert "--completion: give one of bash, zsh, tcsh" in capsys.readouterr().err


MINIMAL = {
    "base": "base",
    "tasks": {task: {"expert": task, "calibration": f"{task}.jsonl"} for task in ("law", "topic")},
}


def parsed(recipe, *options):
    return cli.parse(["learn", str(recipe), *options]).recipe


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Of the recommended preset: row, free from 0.3, logit alignment with options, Adam.
        (["--coefficients.constraint", "softmax"], {"coefficients.initial": None}),
        (
            ["--coefficients.constraint", "sigmoid", "--coefficients.initial=0.4"],
            {"coefficients.initial": 0.4},
        ),
        (
            ["--objectives", "[{name: entropy}, {name: logit_alignment, weight: 0.5}]"],
            {
                "objectives.0.name": "entropy",
                "objectives.0.options": {},
                "objectives.1.weight": 0.5,
            },
        ),
        (
            ["--interference", "[{name: trim, options: {density: 0.2}}]"],
            {"interference.0.options": {"density": 0.2}},
        ),
        (
            [
                "--coefficients.granularity",
                "chunk",
                "--coefficients.granularity-options={pieces: 4}",
            ],
            {"coefficients.granularity_options": {"pieces": 4}, "coefficients.initial": "auto"},
        ),
        (
            ["--preset", "atlas-k", "--coefficients.granularity", "layer"],
            {
                "coefficients.granularity_options": {},
                "learning.optimizer.options.weight_decay": 0.1,
            },
        ),
        (
            ["--preset=atlas", "--learning.optimizer.name", "sgd"],
            {"learning.optimizer.options": {}, "learning.optimizer.learning_rate": 0.1},
        ),
        (["--preset", "expert-merging", "--regularizers", "[]"], {"regularizers": []}),
        (["--learning.optimizer.options", "{b1: 0.5}"], {"learning.optimizer.options.b1": 0.5}),
    ],
)
def test_choices_on_the_command_line(tmp_path, options, expected):
    recipe = parsed(write_recipe(tmp_path, MINIMAL), *options).model_dump()
    for path, value in expected.items():
        found = recipe
        for key in path.split("."):
            found = found[int(key) if key.isdigit() else key]
        assert found == value, path


@pytest.mark.parametrize(
    ("options", "section"),
    [
        (["--retain", "none"], "retain"),
        (["--retain=null"], "retain"),
        (["--coefficients.coarse", "none"], "coefficients.coarse"),
        (["--coefficients.initial-merge=none"], "coefficients.initial_merge"),
        (["--coefficients.initial_merge", "none"], "coefficients.initial_merge"),
        (["--tasks.law.test", "none", "--tasks.topic.test", "none"], "tasks.law.test"),
    ],
)
def test_a_section_is_switched_off(options, section, tmp_path):
    tasks = {task: fields | {"test": "test.jsonl"} for task, fields in MINIMAL["tasks"].items()}
    further = {"coarse": {"steps": 3}, "initial_merge": {"name": "ties"}, "initial": 0.0}
    recipe = write_recipe(tmp_path, MINIMAL | {"tasks": tasks, "coefficients": further})
    for options_given, is_there in (([], True), (options, False)):
        value = parsed(recipe, *options_given)
        for name in section.split("."):
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        assert (value is not None) == is_there


@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        (["--heads", "refitted"], "heads.kind", "refitted"),
        (["--heads=scaled"], "heads.kind", "scaled"),
        (["--base", "other/base"], "base.path", "other/base"),
        (["--tasks.law.expert", "new"], "tasks.law.expert.path", "new"),
        (["--retain", "general.jsonl"], "retain.path", "general.jsonl"),
    ],
)
def test_a_section_is_written_as_one_word(options, path, value, tmp_path):
    found = parsed(write_recipe(tmp_path, MINIMAL), *options)
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value


def test_a_section_is_not_both_off_and_changed(tmp_path):
    recipe = write_recipe(tmp_path, MINIMAL)
    with pytest.raises(InputError, match=r"--retain none and --retain\.weight cannot both be"):
        parsed(recipe, "--retain", "none", "--retain.weight", "2")


@pytest.mark.parametrize("section", ["retain", "tasks.TASK.test", "coefficients.initial-merge"])
def test_help_says_which_sections_are_switched_off(section, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main(["learn", "--help"])
    assert f"--{section} none" in capsys.readouterr().out


def test_a_choice_takes_the_place_of_the_file_s(tmp_path):
    chosen = {"granularity": "chunk", "granularity_options": {"pieces": 4}}
    recipe = write_recipe(tmp_path, MINIMAL | {"coefficients": chosen})
    assert parsed(recipe).coefficients.granularity_options == {"pieces": 4}
    assert parsed(recipe, "--seed", "3").coefficients.granularity_options == {"pieces": 4}
    assert (
        parsed(recipe, "--coefficients.granularity=tensor").coefficients.granularity_options == {}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coefficients.constraint", "softmax", "--coefficients.initial", "0.3"], "initial: 0.3"),
        (["--objectives", "entropy"], "field objectives: found 'entropy'"),
        (["--objectives", "[{name: entrpy}]"], "nearest is 'entropy'"),
        (["--objectives", "[{name: entropy, wait: 1}]"], "unknown field objectives.0.wait"),
    ],
)
def test_choices_that_cannot_be(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        parsed(write_recipe(tmp_path, MINIMAL), *options)
    assert str(caught.value).startswith("command line: ")
    assert "\n" not in str(caught.value)


def test_an_option_that_is_no_yaml(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(write_recipe(tmp_path, MINIMAL), "--objectives", "[{name: entropy")
    assert caught.value.code == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_a_yaml_file_that_is_no_recipe(tmp_path):
    recipe = str(write_recipe(tmp_path, MINIMAL))
    start = ["--coefficients.start", "merge.yaml"]
    for arguments in ([*start, recipe], [recipe, *start], ["--coefficients.start=m.yaml", recipe]):
        assert list(cli.parse(["learn", *arguments]).recipe.tasks) == list(MINIMAL["tasks"])


ROOT = Path(__file__).parents[2]


def documented_commands() -> list[str]:
    """Returns the `adamerge` commands of README and guides that take a recipe, one a line."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
    text = "".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = re.findall(r"^    (?:PYTHONPATH=\S+ )?(adamerge .*)", text, re.MULTILINE)
    return list(dict.fromkeys(line for line in commands if ".yaml" in line))


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_fit_the_first_recipe_of_the_readme(line, tmp_path, monkeypatch):
    _, *arguments = shlex.split(line.partition("  #")[0])
    written = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for argument in arguments:
        if Path(argument).name in ("recipe.yaml", "more.yaml", "text6.yaml"):
            (tmp_path / argument).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / argument).write_text(written)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    assert list(cli.parse(arguments).recipe.tasks) == ["sentiment", "topic"]


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["lern", "recipe.yaml"])
    assert caught.value.code == 2
    listed = ", ".join(cli.COMMANDS)
    assert capsys.readouterr().err == f"error: no command 'lern'; the commands are {listed}\n"


@pytest.mark.parametrize("chosen", [None, "/elsewhere", ""])
def test_compiled_programs_are_kept(chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if chosen is None:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    else:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    before = jax.config.jax_compilation_cache_dir
    try:
        # As JAX reads it when it is imported.
        jax.config.update("jax_compilation_cache_dir", chosen or None)
        keep_compiled_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == (str(tmp_path / "adamerge_jax/compiled") if chosen is None else chosen or None)


@pytest.fixture
def old_order(tmp_path) -> list[str]:
    recipe = str(write_recipe(tmp_path, MINIMAL))
    return ["fold", "old.safetensors", "--recipe", recipe, "--out", "merged", "--scale", "law=0"]


def test_a_recipe_as_an_option_still_works(old_order, capsys):
    parsed_command = cli.parse(old_order)
    assert list(parsed_command.recipe.tasks) == list(MINIMAL["tasks"])
    command = parsed_command.command
    assert (str(command.coefficients), command.scale) == ("old.safetensors", ("law=0",))
    assert str(command.recipe_file) == old_order[3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "adamerge fold: --recipe is deprecated; give the recipe first: "
        f"adamerge fold {old_order[3]} ..."
    )


def test_the_version_is_that_of_the_installation(capsys):
    installed = importlib.metadata.version("adamerge_jax")
    assert adamerge_jax.__version__ == installed
    cli.main(["--version"])
    assert capsys.readouterr().out == f"adamerge_jax {installed}\n"


def test_python_runs_the_package_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adamerge_jax", "--version"])
    runpy.run_module("adamerge_jax", run_name="__main__")
    assert capsys.readouterr().out.startswith("adamerge_jax ")
