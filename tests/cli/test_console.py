import os
import subprocess
import sys

from adamerge_jax.cli.console import make_console


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
