import jax
import pytest

from adamerge_jax import cli
from adamerge_jax.compilation import keep_compiled_programs
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


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["lern", "recipe.yaml"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: no command 'lern'; the commands are learn,")


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
