"""An instant start: the package imports heavy libraries only when something needs them.

In subprocesses, because the tests themselves import all of them.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.references import WITHOUT_FIGURES, WITHOUT_PYTORCH, write_recipe

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "orbax",
    "scipy.linalg",
    "scipy.ndimage",
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
)

TOUCH_ALL_NAMES = """
for name in adamerge_jax.__all__:
    getattr(adamerge_jax, name)
"""

# Modules of the core and of the models, down to an architecture's own file.
IMPORT_ALL_ARCHITECTURES = """
import importlib
from adamerge_jax.models import ARCHITECTURES, zero_shot
for module in ARCHITECTURES.values():
    importlib.import_module(module)
"""

IMPORT_ALL_STAGES = """
import importlib, pkgutil
for room in ("checkpoints", "data", "learning", "pipeline", "plan", "recipes", "runs"):
    package = importlib.import_module(f"adamerge_jax.{room}")
    for module in pkgutil.iter_modules(package.__path__, f"adamerge_jax.{room}."):
        importlib.import_module(module.name)
"""


def imported_after(*parts: str) -> list[set[str]]:
    """The heavy libraries that a new process has imported after each part of some code."""
    lines = ["import json, sys", "imported = []"]
    for part in parts:
        lines += [part, "imported.append(sorted(sys.modules))"]
    script = "\n".join([*lines, "print(json.dumps(imported))"])
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return [set(modules) & set(HEAVY) for modules in json.loads(process.stdout)]


def test_importing_imports_nothing_heavy() -> None:
    """In one process: what a part imports is still there after the next."""
    package, names, architectures, stages = imported_after(
        "import adamerge_jax", TOUCH_ALL_NAMES, IMPORT_ALL_ARCHITECTURES, IMPORT_ALL_STAGES
    )
    assert package == set()
    assert names == set()
    assert architectures == set()
    assert stages - {"orbax"} == set()  # a run keeps snapshots


def test_heavy_libraries_are_noticed() -> None:
    assert imported_after("", "import matplotlib") == [set(), {"matplotlib"}]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("granularities", "coefficients.granularities"),
        ("jobs", "pipeline.run"),
        ("regularizers", "objectives.regularizers"),
    ],
)
def test_modules_that_have_moved_are_found_by_their_old_names(old, new):
    sys.modules.pop(f"adamerge_jax.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"adamerge_jax.{old} is now adamerge_jax.{new}"):
        module = importlib.import_module(f"adamerge_jax.{old}")
    assert module is importlib.import_module(f"adamerge_jax.{new}")


LEARN = """
import json, sys
from adamerge_jax.cli.main import main
for command in json.loads(sys.argv[1]):
    main(command)
assert "torch" not in sys.modules
"""


def test_a_run_needs_no_pytorch(
    text_recipe: dict[str, Any], image_recipe: dict[str, Any], tmp_path: Path
) -> None:
    commands = []
    for kind, fields in {"text": text_recipe, "image": image_recipe}.items():
        fields["learning"] = {"steps": 1, "batch_size": 2}
        fields["export"] = {"orbax": kind == "image"}
        # The base has a head, which the merged model has not: its class must be looked up.
        fields["base"] = next(iter(fields["tasks"].values()))["expert"]
        (tmp_path / kind).mkdir()
        recipe = write_recipe(tmp_path / kind, fields)
        commands.append(["learn", str(recipe), "--out", str(tmp_path / kind / "run")])
    command = [
        sys.executable,
        "-c",
        WITHOUT_PYTORCH + WITHOUT_FIGURES + LEARN,
        json.dumps(commands),
    ]
    subprocess.run(command, check=True)
    for kind, architecture in {"text": "BertModel", "image": "ViTModel"}.items():
        config = json.loads((tmp_path / kind / "run/checkpoint/config.json").read_text())
        assert config["architectures"] == [architecture]
