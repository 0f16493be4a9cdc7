"""The base's answers to general prompts, kept for other runs that ask the same."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.files.caches import cache_folder, keep_if_possible, read_from_cache
from adamerge_jax.pipeline.models import Models
from adamerge_jax.runs.counting import ShowCount

log = logging.getLogger(__name__)

FOLDER = "answers"
"""The name of the folder in the user's cache."""

MOST_BYTES = 100_000_000
"""The size of all kept answers together; the oldest make room."""

LARGEST_FILE = 20_000_000
"""The size of the largest file that is kept, or read."""


class _SavedAnswers(BaseModel):
    """The file of answers, with all that they depend on and a digest of them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    facts: dict[str, Any]
    answers: list[list[NonNegativeInt]]
    digest: str


class BaseWriter(NamedTuple):
    """The base as a writer of answers, which are written once and read by later runs.

    Attributes:
        writer: The writer of the architecture.
        models: The base and its experts.
        dtype: The dtype of weights and activations; None for the checkpoint's.
        read_base: The function that reads the base's parameters.
        show_count: Shows how many answers are written.
    """

    writer: Writer
    models: Models
    dtype: np.dtype | None
    read_base: Callable[[], Mapping[str, Array]]
    show_count: ShowCount

    def answers(
        self, prompts: Sequence[list[int]], stops: Sequence[int], new_tokens: int
    ) -> list[list[int]]:
        """Returns the likeliest tokens behind each prompt, with the token that stopped them.

        They are read from the user's cache if the same base has answered the same prompts before.

        Args:
            prompts: The tokens of N prompts.
            stops: The tokens that end an answer.
            new_tokens: The largest number of tokens.
        """
        # In one order: another seed divides the same prompts in another way.
        asked = [list(prompt) for prompt in sorted({tuple(prompt) for prompt in prompts})]
        if jax.process_count() > 1:
            # They compute together, and not all of them might have the file.
            written = self._write(asked, stops, new_tokens)
        else:
            written = self._cached(asked, stops, new_tokens)
        by_prompt = dict(zip(map(tuple, asked), written, strict=True))
        return [by_prompt[tuple(prompt)] for prompt in prompts]

    def _write(
        self, prompts: Sequence[list[int]], stops: Sequence[int], new_tokens: int
    ) -> list[list[int]]:
        with self.show_count("the base's answers to general prompts", len(prompts)) as on_count:
            return self.writer.continuations(
                self.read_base(), prompts, stops, new_tokens, with_stop=True, on_count=on_count
            )

    def _cached(
        self, prompts: Sequence[list[int]], stops: Sequence[int], new_tokens: int
    ) -> list[list[int]]:
        facts = {
            **self._facts(),
            "prompts": _digest(prompts),
            "stops": [*map(int, stops)],
            "new_tokens": new_tokens,
        }
        file = cache_folder(FOLDER) / f"{_digest(facts)[:32]}.json"
        answers = _read(file, facts)
        if answers is not None and _are_possible(
            answers, len(prompts), stops, new_tokens, self.models.config.vocab_size
        ):
            return answers
        answers = self._write(prompts, stops, new_tokens)
        saved = _SavedAnswers(facts=facts, answers=answers, digest=_digest(answers))
        keep_if_possible(
            file,
            json.dumps(saved.model_dump()) + "\n",
            largest=LARGEST_FILE,
            most_bytes=MOST_BYTES,
            words="the base's answers",
            otherwise="the next run writes them anew",
        )
        return answers

    def _facts(self) -> dict[str, Any]:
        """Returns all that decides what the base writes, but for what it is asked."""
        base = self.models.base
        files = sorted({info.file for info in base.checkpoint.tensors.values()})
        # The fingerprint is of a sample of the weights; times tell of changes outside of it.
        stamps = [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
        device = jax.devices()[0]
        return {
            "base": base.identity(),
            "files": stamps,
            "config": _digest(self.models.config.to_dict()),
            "dtype": str(self.dtype),
            "batch_size": self.writer.batch_size,
            "devices": [device.platform, device.device_kind, str(self.models.devices)],
            "versions": [version("adamerge_jax"), jax.__version__],
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path, facts: Mapping[str, Any]) -> list[list[int]] | None:
    """Returns the answers in a file; None where there are none of these facts, or it is damaged."""
    try:
        fields = read_from_cache(file, LARGEST_FILE)
        if fields is None:
            return None
        saved = _SavedAnswers.model_validate(fields)
    except (OSError, InputError, ValidationError) as error:
        log.warning(f"{file} cannot be read, and the base writes its answers anew: {error}")
        return None
    if saved.facts != facts or saved.digest != _digest(saved.answers):
        log.warning(f"{file} is not what was written there, and the base writes its answers anew")
        return None
    return saved.answers


def _are_possible(
    answers: Sequence[list[int]],
    count: int,
    stops: Sequence[int],
    new_tokens: int,
    vocabulary: int,
) -> bool:
    """Returns True if a model may have written so many answers: each is whole, of its tokens."""
    ends = set(stops)
    return len(answers) == count and all(
        0 < len(answer) <= new_tokens
        and max(answer) < vocabulary
        and ends.isdisjoint(answer[:-1])
        and (len(answer) == new_tokens or answer[-1] in ends)
        for answer in answers
    )
