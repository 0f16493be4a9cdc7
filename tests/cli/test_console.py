import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.cli.console import make_console
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import WITHOUT_PYTORCH, random_coefficients, write_recipe


def test_a_file_takes_wide_tables(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 120
    assert make_console(width=220).width == 220


def test_columns_says_otherwise(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    assert make_console(width=220).width == 70


def test_brackets_are_no_markup(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    make_console().print("runs/[v2]/report.html")
    assert capsys.readouterr().out == "runs/[v2]/report.html\n"


def test_transformers_is_quiet_and_not_imported_for_it():
    code = """
import os, sys
from adamerge_jax.cli.console import make_console, show_log_lines
show_log_lines(make_console())
assert "transformers" not in sys.modules
import transformers
assert transformers.logging.get_verbosity() == transformers.logging.ERROR
"""
    environment = {
        name: text for name, text in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


WARNING = r"warning: .*cut to max_length=3 tokens"
ERROR = r"error: .*'nowhere\.\*' fits no merged tensor"


@pytest.fixture
def command(text_recipe, tmp_path) -> list[str]:
    """A process that warns while a spinner turns, and is refused then."""
    text_recipe["max_length"] = 3
    text_recipe["coefficients"] = {
        "granularity": "groups",
        "granularity_options": {"patterns": {"some": ["nowhere.*"]}},
    }
    recipe = write_recipe(tmp_path, text_recipe)
    # Orbax logs while it is imported, which sets up Python's default handler.
    script = "import orbax.checkpoint; from adamerge_jax.cli.main import main; main()"
    script = WITHOUT_PYTORCH + script
    return [sys.executable, "-c", script, "learn", str(recipe), "--out", str(tmp_path / "run")]


def test_a_pipe_gets_lines(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    *warnings, error = done.stderr.splitlines()
    assert warnings and all(re.match(WARNING, line) for line in warnings)
    assert re.match(ERROR, error)


def test_a_terminal_gets_whole_lines_above_the_spinner(command):
    text = on_a_terminal(command)
    # What a line shows: what was written to it since it was erased, without colours.
    lines = [line.rpartition("\x1b[2K")[2] for line in text.replace("\r", "").split("\n")]
    shown = [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line) for line in lines]
    assert "opening checkpoints and data" in text
    assert any(re.match(WARNING, line) for line in shown)
    assert not any("opening" in line and "max_length" in line for line in shown)
    assert any(re.match(ERROR, line) for line in shown)
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l")  # the cursor is shown again


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to a terminal."""
    terminal, end = pty.openpty()
    variables = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=variables)
    os.close(end)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # Linux's end of a terminal
        pass
    os.close(terminal)
    assert process.wait() == 2
    return written.decode()


def test_quiet_commands_give_the_answer_alone(text_fields, tmp_path, capsys):
    models = open_models(parse_recipe(text_fields), Path(tmp_path))
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(models).save(file)
    cli.main(["inspect", str(file), "--quiet"])
    assert "tone" in capsys.readouterr().out
    recipe = write_recipe(tmp_path, text_fields | {"export": {"orbax": False}})
    cli.main(["fold", str(recipe), str(file), "--out", str(tmp_path / "out"), "--quiet"])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "checkpoint").is_dir()
