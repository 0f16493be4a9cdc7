"""Rows of baselines, kept in the user's cache for other runs with the same models and data."""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from adamerge_jax.data.copies import WithCopies
from adamerge_jax.data.examples import Examples
from adamerge_jax.devices import fetch
from adamerge_jax.errors import InputError
from adamerge_jax.files.caches import (
    cache_folder,
    code_digest,
    keep_if_possible,
    read_from_cache,
)
from adamerge_jax.pipeline.learn import LearningInputs
from adamerge_jax.registry import is_own_code
from adamerge_jax.runs.rows import Kind, Row
from adamerge_jax.runs.saved_rows import SavedRow

log = logging.getLogger(__name__)

FOLDER = "baselines"
"""The name of the folder in the user's cache."""

MOST_BYTES = 200_000_000
"""The size of all kept rows together; the oldest make room."""

LARGEST_FILE = 50_000_000
"""The size of the largest file that is kept, or read."""

_COMPUTING = ("adamerge_jax", "jax", "jaxlib", "transformers", "torch", "torchax")
"""The packages that decide on numbers: models without a family here are run by those of PyTorch."""

_PRECISION = ("jax_default_matmul_precision", "jax_enable_x64")
"""The settings of JAX that decide on numbers."""

_EXAMPLES_AT_ONCE = 64
"""The examples that are put into a digest together."""


class RowFacts(NamedTuple):
    """The properties of the rows of one model that are known before they are measured.

    Attributes:
        names: The names that the first row may have.
        kinds: The kind of each row.
        settings: The settings that decide on them, beside models and data.
        fits_heads: True if heads are fitted to the model, on the calibration data.
    """

    names: Sequence[str]
    kinds: Sequence[Kind]
    settings: Mapping[str, Any]
    fits_heads: bool


class _SavedRows(BaseModel):
    """The file of a model's rows, with a digest of all that they depend on, and one of them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    facts: str
    rows: list[SavedRow]
    digest: str


class RowCache:
    """The rows that runs with the same models, data, settings and code have measured."""

    def __init__(self, inputs: LearningInputs):
        """Looks at nothing yet.

        Args:
            inputs: The models, task vectors and data.
        """
        self._inputs = inputs

    @classmethod
    def of(cls, inputs: LearningInputs) -> "RowCache | None":
        """Returns the cache for a run; None where its rows cannot be kept.

        Several processes compute together, and not all of them might have a file. Code of the
        user's own may be another one tomorrow.
        """
        if jax.process_count() > 1 or any(is_own_code(step.name) for step in inputs.interference):
            return None
        return cls(inputs)

    def find(self, facts: RowFacts) -> list[Row] | None:
        """Returns the rows of a model; None where there are none, or none that can be read."""
        file, key = self._place(facts)
        try:
            fields = read_from_cache(file, LARGEST_FILE)
            if fields is None:
                return None
            saved = _SavedRows.model_validate(fields)
            rows = [row.restored() for row in saved.rows]
        except (OSError, InputError, ValidationError, KeyError, ValueError) as error:
            log.warning(f"{file} cannot be read, and its model is evaluated again: {error}")
            return None
        is_whole = saved.facts == key and saved.digest == _digest(_as_json(saved.rows))
        if not is_whole or not self._are_possible(rows, facts):
            log.warning(f"{file} is not what was written there; its model is evaluated again")
            return None
        return rows

    def keep(self, facts: RowFacts, rows: Sequence[Row]) -> None:
        """Writes the rows of a model; those with a score that is not finite are not kept."""
        if not self._are_possible(rows, facts):
            return
        file, key = self._place(facts)
        saved_rows = [SavedRow.of(row) for row in rows]
        saved = _SavedRows(facts=key, rows=saved_rows, digest=_digest(_as_json(saved_rows)))
        content = json.dumps(saved.model_dump(), ensure_ascii=False) + "\n"
        keep_if_possible(
            file,
            content,
            largest=LARGEST_FILE,
            most_bytes=MOST_BYTES,
            words="the rows of baselines",
            otherwise="the next run evaluates them again",
        )

    def _are_possible(self, rows: Sequence[Row], facts: RowFacts) -> bool:
        """Returns True if these rows may have been measured on this test data."""
        test = self._inputs.workspace.data.test
        if [row.kind for row in rows] != list(facts.kinds) or not rows:
            return False
        if rows[0].method not in facts.names:
            return False
        if any(not row.method.startswith(rows[0].method) for row in rows):
            return False
        sizes = {task: len(examples) for task, examples in test.items()}
        further = (other for row in rows for other in row.further)
        return all(_is_measured(row, sizes) for row in rows) and all(
            _is_measured(other, None) for other in further
        )

    def _place(self, facts: RowFacts) -> tuple[Path, str]:
        """Returns the file of some rows, and the digest of all that they depend on."""
        parts: dict[str, Any] = {
            "names": list(facts.names),
            "kinds": list(facts.kinds),
            "settings": dict(facts.settings),
            "common": self._common,
        }
        if facts.fits_heads:
            parts["calibration"] = self._calibration
        key = _digest(parts)
        return cache_folder(FOLDER) / f"{key[:40]}.json", key

    @functools.cached_property
    def _common(self) -> dict[str, Any]:
        """All that decides on the rows of any model, but for calibration data."""
        inputs, workspace = self._inputs, self._inputs.workspace
        models, evaluator, general = workspace.models, workspace.evaluator, workspace.general
        device, method = jax.devices()[0], inputs.method
        general_facts = None
        if general is not None:
            openings = None if general.openings is None else general.openings.tolist()
            general_facts = [_digest_of_examples(general.test), openings]
        return {
            "models": [[name, *_describe_model(model)] for name, model in models.by_name.items()],
            "mixed": _digest(inputs.mixed),
            "interference": _digest(
                [[step.name, dict(step.options), step.fitted] for step in inputs.interference]
            ),
            "dtypes": [str(workspace.dtype), str(method.delta_dtype), str(method.memory)],
            "heads": _digest_of_heads(workspace.heads),
            "test": {t: _digest_of_examples(e) for t, e in workspace.data.test.items()},
            "evaluator": evaluator.settings(),
            "general": general_facts,
            "devices": [device.platform, device.device_kind, str(models.devices)],
            "precision": [getattr(jax.config, name) for name in _PRECISION],
            "versions": [*map(_version, _COMPUTING), code_digest()],
        }

    @functools.cached_property
    def _calibration(self) -> dict[str, Any]:
        """All that decides on heads that are fitted, and on methods that read data."""
        calibration = self._inputs.calibration.examples
        unchanged = {
            task: examples.unchanged if isinstance(examples, WithCopies) else examples
            for task, examples in calibration.items()
        }
        return {
            "seed": self._inputs.method.seed,
            "copies": {
                task: examples.copies
                for task, examples in calibration.items()
                if isinstance(examples, WithCopies)
            },
            "examples": self.digest_of(unchanged),
        }

    def digest_of(self, data: Mapping[str, Examples]) -> dict[str, str]:
        """Returns a digest of each task's examples, for the settings of rows."""
        return {task: _digest_of_examples(examples) for task, examples in data.items()}


def _is_measured(row: Row, sizes: Mapping[str, int] | None) -> bool:
    """Returns True if a row has finite scores of examples, of these numbers, and their means."""
    examples = row.examples or {}
    if row.tasks.keys() != examples.keys() or (
        sizes is not None and examples.keys() != sizes.keys()
    ):
        return False
    for task, scores in examples.items():
        if len(scores.values) != len(scores.counts) or not len(scores.values):
            return False
        if sizes is not None and len(scores.values) != sizes[task]:
            return False
        if not np.isfinite(scores.values).all() or (scores.counts < 0).any():
            return False
        if scores.classes is not None and len(scores.classes) != len(scores.values):
            return False
        if not scores.counts.any() or not math.isclose(row.tasks[task], scores.mean, rel_tol=1e-6):
            return False
    return True


def _version(package: str) -> str | None:
    """Returns the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_model(model: Any) -> list[Any]:
    """Returns the fingerprint of a model, and the sizes and times of its files.

    The fingerprint is of a sample of the weights; times tell of changes outside of it.
    """
    files = {info.file for info in model.checkpoint.tensors.values()}
    files |= {file for file in model.checkpoint.folder.iterdir() if file.is_file()}
    stamps = [
        [file.name, status.st_size, status.st_mtime_ns]
        for file, status in ((file, file.stat()) for file in sorted(files))
    ]
    return [model.identity(), _digest(stamps)]


def _digest_of_heads(heads: Mapping[str, Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for task, parameters in heads.items():
        for name, array in parameters.items():
            _add_array(digest, f"{task}.{name}", fetch(array))
    return digest.hexdigest()


def _digest_of_examples(examples: Examples) -> str:
    """Returns a digest of the inputs and labels of all examples, in their order."""
    digest = hashlib.sha256()
    for start in range(0, len(examples), _EXAMPLES_AT_ONCE):
        index = np.arange(start, min(start + _EXAMPLES_AT_ONCE, len(examples)))
        length = examples.padded_length(index)
        for name, array in sorted(examples.take(index, length).items()):
            _add_array(digest, name, array)
        labels = examples.take_labels(index, length)
        if labels is not None:
            _add_array(digest, "labels", labels)
            _add_array(digest, "ends", examples.take_ends(index, length))
        counted = examples.take_counted(index, length)
        if counted is not None:
            _add_array(digest, "counted", counted)
    for name in ("scores", "partners"):
        if (of_pairs := getattr(examples, name)) is not None:
            _add_array(digest, name, of_pairs)
    digest.update(_digest(examples.class_names).encode())
    if (answers := examples.answers) is not None:
        asked = [answers.prompts, answers.responses, list(answers.stops)]
        digest.update(_digest(asked).encode())
    return digest.hexdigest()


def _add_array(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _as_json(rows: Sequence[SavedRow]) -> list[Any]:
    return [row.model_dump() for row in rows]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
