"""The names of a run folder's files, and how they are written and read."""

import json
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"
RESULTS_FILE = "results.json"
COEFFICIENTS_FILE = "coefficients.safetensors"
HEAT_MAP_FILE = "coefficients.png"
PAGE_FILE = "report.html"
STATE_FOLDER = "state"
"""The folder in which an unfinished run keeps the state to go on from."""


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file, or writes it anew, such that it is never there in part.

    Args:
        file: A file in the run folder; `.partial` beside it grows until it is whole.
        content: Its content.
    """
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; it is empty where there is no file.

    Raises:
        InputError: The file is no JSON.
    """
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: no readable JSON ({error})") from error
