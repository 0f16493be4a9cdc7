"""The rows that a comparison keeps in its folder, each under a key of all that it depends on."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adamerge_jax.comparison.contenders import Contender
from adamerge_jax.comparison.measure import Cost, Measured
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object
from adamerge_jax.files.writing import write_whole
from adamerge_jax.recipes.schema import HeadKind
from adamerge_jax.runs.saved_rows import SavedRow

log = logging.getLogger(__name__)

_DATA = ("base", "tasks", "tokenizer", "max_length", "dtype", "retain")
"""The fields that decide on the base's and the experts' scores."""

_MERGE = (*_DATA, "keep_from_base", "task_vectors")
"""The fields that decide on a merge without learning."""

_NO_INFLUENCE = ("name", "export", "tracking", "devices", "evaluation")
"""The fields that decide on no learned coefficient."""

_CONTENDERS = ("methods", "task_arithmetic", "lm_eval")
"""The fields of the evaluation that name what is compared, or what is not looked at."""


class _SavedResults(BaseModel):
    """The file of a contender."""

    model_config = ConfigDict(extra="forbid")
    rows: list[SavedRow]
    cost: Cost
    chosen: dict[str, Any]
    fits: tuple[HeadKind, ...]


def row_file(folder: Path, contender: Contender, data_seed: int, root: Path) -> Path:
    """Returns the file of a contender's row: another one if anything changes that it depends on.

    That are the recipe's fields, the options, the version of this package, and the sizes and times
    of local files of models and data.

    Args:
        folder: The folder of the rows.
        contender: The contender.
        data_seed: The seed that draws the test examples.
        root: Folder that relative paths of the recipe start from.
    """
    fields = contender.fields
    if contender.kind == "learning":
        relevant = {name: v for name, v in fields.items() if name not in _NO_INFLUENCE}
    else:
        names = _DATA if contender.kind == "references" else _MERGE
        relevant = {name: fields[name] for name in names}
    if contender.kind == "merge":
        relevant["examples"] = fields["learning"]["examples"]
        relevant["seed"] = contender.seed
    facts = {
        "recipe": relevant,
        "method": [contender.kind, contender.method, dict(contender.options), contender.heads],
        "data_seed": data_seed,
        "evaluation": {n: v for n, v in fields["evaluation"].items() if n not in _CONTENDERS},
        "files": _stamps(fields, root),
        "version": version("adamerge_jax"),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", contender.name).strip("-")[:40].lower()
    seed = "" if contender.kind == "references" else f"-seed{contender.seed}"
    return folder / f"{slug}{seed}-{digest}.json"


def save(measured: Measured, file: Path) -> None:
    """Writes the results of a contender."""
    saved = _SavedResults(
        rows=[SavedRow.of(row) for row in measured.rows],
        cost=measured.cost,
        chosen=dict(measured.chosen),
        fits=measured.fits,
    )
    write_whole(file, json.dumps(saved.model_dump(), ensure_ascii=False) + "\n")


def load(file: Path) -> Measured | None:
    """Reads the results of a contender; None where there are none, or none that can be read."""
    if not file.is_file():
        return None
    try:
        saved = _SavedResults.model_validate(read_object(file))
        rows = [row.restored() for row in saved.rows]
    except (InputError, ValidationError, KeyError, ValueError) as error:
        log.warning("%s cannot be read and is measured again: %s", file, error)
        return None
    return Measured(rows, saved.cost, saved.chosen, saved.fits)


def _stamps(fields: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Returns the sizes and times of the local files that a recipe names."""
    paths = [fields["base"]["path"], fields["coefficients"]["start"]]
    for task in fields["tasks"].values():
        paths += [source["path"] for source in task.values() if isinstance(source, dict)]
    paths.append((fields["retain"] or {}).get("path"))
    return {path: _stamp(root / Path(path).expanduser()) for path in paths if path is not None}


def _stamp(path: Path) -> list[Any]:
    """Returns the names, sizes and times of a file, or of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [path] if path.is_file() else []  # or an id on the Hub
    return [
        [str(file.relative_to(path)), status.st_size, status.st_mtime_ns]
        for file, status in ((file, file.stat()) for file in files)
    ]
