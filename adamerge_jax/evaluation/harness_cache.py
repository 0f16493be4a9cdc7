"""Scores by lm-evaluation-harness, kept in the user's cache for runs with the same models."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from pydantic import BaseModel, ConfigDict, ValidationError

from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import HarnessModel, LoadedTasks
from adamerge_jax.files.caches import (
    cache_folder,
    code_digest,
    keep_if_possible,
    read_from_cache,
)
from adamerge_jax.runs.harness import HarnessTask

log = logging.getLogger(__name__)

FOLDER = "lm-eval"
"""The name of the folder in the user's cache."""

MOST_BYTES = 20_000_000
"""The size of all kept scores together; the oldest make room."""

LARGEST_FILE = 2_000_000
"""The size of the largest file that is kept, or read."""


class _SavedScores(BaseModel):
    """The file of a model's scores, with a digest of all that they depend on, and one of them."""

    model_config = ConfigDict(extra="forbid")
    facts: str
    tasks: list[HarnessTask]
    digest: str


class HarnessCache:
    """The scores that runs with the same models, tasks, settings and code have measured."""

    def __init__(self, facts: Sequence[Any]):
        """Looks at nothing yet.

        Args:
            facts: All that decides on scores, beside models and tasks, as JSON.
        """
        self._facts = [*facts, code_digest(), jax.devices()[0].device_kind]

    def find(self, model: HarnessModel, loaded: LoadedTasks) -> list[HarnessTask] | None:
        """Returns a model's scores; None where there are none, or none that can be read."""
        file, key = self._place(model, loaded)
        try:
            fields = read_from_cache(file, LARGEST_FILE)
            if fields is None:
                return None
            saved = _SavedScores.model_validate(fields)
        except (OSError, InputError, ValidationError) as error:
            log.warning(f"{file} cannot be read, and its model is evaluated again: {error}")
            return None
        if saved.facts != key or saved.digest != _digest_of_scores(saved.tasks) or not saved.tasks:
            log.warning(f"{file} is not what was written there; its model is evaluated again")
            return None
        return saved.tasks

    def keep(self, model: HarnessModel, loaded: LoadedTasks, tasks: list[HarnessTask]) -> None:
        """Writes a model's scores; those that are not finite are not kept."""
        if any(score.value is None for task in tasks for score in task.scores):
            return
        file, key = self._place(model, loaded)
        saved = _SavedScores(facts=key, tasks=tasks, digest=_digest_of_scores(tasks))
        content = json.dumps(saved.model_dump(mode="json"), ensure_ascii=False) + "\n"
        keep_if_possible(
            file,
            content,
            largest=LARGEST_FILE,
            most_bytes=MOST_BYTES,
            words="lm-eval scores",
            otherwise="the next run evaluates its models again",
        )

    def _place(self, model: HarnessModel, loaded: LoadedTasks) -> tuple[Path, str]:
        """Returns the file of some scores, and the digest of all that they depend on."""
        folders = [None if folder is None else _stamps(folder) for folder in model]
        key = _digest([self._facts, folders, loaded.name, loaded.digest])
        return cache_folder(FOLDER) / f"{key[:40]}.json", key


def _stamps(folder: Path) -> list[Any]:
    """Returns the place of a checkpoint, and the names, sizes and times of its files."""
    statuses = [(file, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    # A card is no part of a model, and is written again with the scores.
    stamps = [
        [file.name, status.st_size, status.st_mtime_ns]
        for file, status in statuses
        if file.suffix != ".md"
    ]
    return [str(folder.resolve()), stamps]


def _digest_of_scores(tasks: Sequence[HarnessTask]) -> str:
    return _digest([task.model_dump(mode="json") for task in tasks])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
