"""Small commands start at once: each imports what it needs, and only when it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import random_coefficients

PROCESS = """
import json, resource, sys
from adamerge_jax.cli.main import main

try:
    main(sys.argv[1:])
except SystemExit as stopped:
    assert not stopped.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]))
"""
LEARNING = {"flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch"}


def start(*arguments: str) -> tuple[float, set[str]]:
    """Runs a command; returns its processor time in seconds and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return seconds, set(modules)


@pytest.mark.parametrize("command", [[], ["inspect"], ["compare"], ["report"]])
def test_help_needs_no_array_library(command):
    seconds, modules = start(*command, "--help")
    assert not modules & {"jax", "numpy", *LEARNING}
    # A second on a quiet core; tests share theirs.
    assert seconds < 2


def test_reading_coefficients_needs_nothing_that_learning_needs(text_fields, tmp_path):
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(open_models(parse_recipe(text_fields), tmp_path)).save(file)
    for command in (["inspect", str(file)], ["compare", str(file), str(file)]):
        seconds, modules = start(*command)
        assert not modules & LEARNING
        assert seconds < 3
