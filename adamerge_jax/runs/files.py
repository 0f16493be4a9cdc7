"""The names of a run folder's files, and how they are read."""

import json
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError, in_one_line

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"
RESULTS_FILE = "results.json"
COEFFICIENTS_FILE = "coefficients.safetensors"
HEAT_MAP_FILE = "coefficients.png"
PAGE_FILE = "report.html"
LOCK_FILE = ".lock"
"""The file that the process which writes to the folder has locked."""
STATE_FOLDER = "state"
"""The folder that an unfinished run has, from its first file on; of a run that learns it keeps the
state to go on from."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; it is empty where there is no file.

    Raises:
        InputError: The file is no JSON, or no object.
    """
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
        raise InputError(f"{file}: no readable JSON ({in_one_line(error)})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{file}: {type(fields).__name__}; expected a JSON object")
    return fields
