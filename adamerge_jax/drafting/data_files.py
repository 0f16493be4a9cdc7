"""The data of each task among the files of a folder, by the words in their names.

`trec.calibration.jsonl`, `data/trec/train.csv`, `train/trec.parquet` and a folder of images `trec/`
with `train/` and `test/` in it are all found.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from adamerge_jax.data.image_folders import IMAGE_SUFFIXES, METADATA
from adamerge_jax.data.listing import files_below, split_of
from adamerge_jax.data.locations import table_kind
from adamerge_jax.errors import InputError, in_hand, in_one_line
from adamerge_jax.files.json_object import read_object

log = logging.getLogger(__name__)

PARTS = ("calibration", "validation", "test")

_WORDS = {
    "calibration": ("calibration", "calib", "unlabeled", "unlabelled", "train", "training", ""),
    "validation": ("validation", "valid", "val", "dev", "fewshot", "few", "labeled", "labelled"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
"""The words in a name that tell a part, best first; without one, data are to learn from."""

_DEEPEST = 3


class Data(NamedTuple):
    """Data of one part.

    Attributes:
        path: The file or folder, or the id of a data set on the Hub.
        split: Its split, where a folder has several; None for data without.
    """

    path: str
    split: str | None = None


class Candidate(NamedTuple):
    """Data with what their name says.

    Attributes:
        data: The data.
        words: The words of the path, from the folder that was looked through.
        word: The word that tells the part, "" where none does.
        part: The part.
    """

    data: Data
    words: tuple[str, ...]
    word: str
    part: str


Found = dict[str, dict[str, Data]]
"""The data by task and part."""


def find_data(tasks: Sequence[str], places: Sequence[Path]) -> Found:
    """Finds the data of tasks in folders and files.

    Args:
        tasks: Names of the tasks.
        places: Folders to look through, three deep, and files.

    Returns:
        The data by task and part; a task or part that has none is missing.

    Raises:
        InputError: There is no such file or folder.
    """
    distinctive = _distinctive_words(tasks)
    found: dict[str, list[Candidate]] = {task: [] for task in tasks}
    for place in places:
        if not place.exists():
            raise InputError(f"--data: no such file or folder: {place}")
        for candidate, named in _candidates(place, distinctive):
            task = _task_of(named, distinctive)
            if task is not None:
                found[task].append(candidate)
    return {task: chosen for task in tasks if (chosen := _best(found[task]))}


def data_of_one(path: str) -> dict[str, Data]:
    """Returns the parts of data that are said to be one task's.

    Args:
        path: A file, a folder, or the id of a data set on the Hub.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return {"calibration": Data(path, "train"), "test": Data(path, "test")}
    if place.is_file():
        return {"calibration": Data(str(place))}
    # Whatever is in it is the task's: every name fits.
    candidates = [candidate for candidate, _ in _candidates(place, {"": ()})]
    return _best(candidates)


def _candidates(
    place: Path, tasks: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    """Yields data in a place, with all words of their path."""
    if place.is_file():
        yield from _of_file(place, _words(place.name))
        return
    yield from _of_folder(place, (), tasks, 0)


def _of_folder(
    folder: Path, words: tuple[str, ...], tasks: Mapping[str, tuple[str, ...]], depth: int
) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    if _task_of(words, tasks) is not None:
        whole = list(_as_one(folder, words))
        if whole:
            yield from ((candidate, words) for candidate in whole)
            return
    for child in children(folder):
        inner = (*words, *_words(child.name))
        if child.name.startswith("."):
            continue
        if child.is_file():
            yield from _of_file(child, inner)
        elif child.is_dir() and depth < _DEEPEST:
            yield from _of_folder(child, inner, tasks, depth + 1)


def children(folder: Path) -> list[Path]:
    """Returns what lies in a folder, sorted; of one that may not be listed nothing."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        log.warning(f"{folder} cannot be looked through: {error.strerror or in_one_line(error)}")
        return []


def _of_file(file: Path, words: tuple[str, ...]) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    """Yields a file of examples; the last words of its name are its endings."""
    is_table = table_kind(file) is not None and file.name.lower() not in METADATA
    if is_table or file.suffix.lower() == ".npz":
        endings = len([s for s in file.suffixes[-2:] if s.lower() in _ENDINGS])
        words = words[: len(words) - endings]
        yield _candidate(Data(str(file)), words), words


_ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".npz"),
    *(".gz", ".bz2", ".xz"),
)


def _as_one(folder: Path, words: tuple[str, ...]) -> Iterator[Candidate]:
    """Yields the splits of a folder that is a data set as a whole: saved, or of images."""
    if (folder / "dataset_dict.json").is_file():
        with in_hand(folder):
            splits = read_object(folder / "dataset_dict.json").get("splits", [])
        yield from (_of_split(folder, words, split) for split in splits if isinstance(split, str))
        return
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        yield _candidate(Data(str(folder)), words)
        return
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    tables = [file for file in files if table_kind(file) and file.name.lower() not in METADATA]
    if not images or tables:
        return
    top = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    parts = [name for name in top if _part_of((name.lower(),))[0]]
    if top and parts == top:
        for name in top:
            if split_of(name):
                yield _of_split(folder, words, name)
            else:
                yield _candidate(Data(str(folder / name)), (*words, name.lower()))
        return
    yield _candidate(Data(str(folder)), words)


def _of_split(folder: Path, words: tuple[str, ...], split: str) -> Candidate:
    return _candidate(Data(str(folder), split), (*words, split.lower()))


def _candidate(data: Data, words: tuple[str, ...]) -> Candidate:
    return Candidate(data, words, *_part_of(words))


def _part_of(words: Sequence[str]) -> tuple[str, str]:
    """Returns the last word that tells a part, and the part."""
    for word in reversed(words):
        for part, telling in _WORDS.items():
            if word and word in telling:
                return word, part
    return "", "calibration"


def _best(candidates: Sequence[Candidate]) -> dict[str, Data]:
    """Returns the data of each part whose name tells it best; of alike ones the shortest path."""
    chosen = {}
    for part in PARTS:
        of_part = [candidate for candidate in candidates if candidate.part == part]
        if of_part:
            best = min(
                of_part,
                key=lambda candidate: (
                    _WORDS[part].index(candidate.word),
                    len(candidate.words),
                    candidate.data,
                ),
            )
            chosen[part] = best.data
    return chosen


def _task_of(words: tuple[str, ...], tasks: Mapping[str, tuple[str, ...]]) -> str | None:
    """Returns the task whose words follow each other among the words of a path.

    Of `law` and `law_us`, both of which fit `law_us.jsonl`, it is the one with more words there.
    """
    fitting = [
        (len(set(_words(task)) & set(words)), len(of_task), task)
        for task, of_task in tasks.items()
        if any(words[at : at + len(of_task)] == of_task for at in range(len(words) + 1))
    ]
    return max(fitting)[-1] if fitting else None


def _distinctive_words(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the words of each task's name, without those that all tasks begin or end with.

    The experts `bert-base-sst2` and `bert-base-trec` have data called `sst2` and `trec`.
    """
    words = {task: _words(task) for task in tasks}
    if len(tasks) == 1:
        return words
    shortest = min(map(len, words.values()))
    lists = list(words.values())
    before = next((at for at in range(shortest) if len({own[at] for own in lists}) > 1), shortest)
    behind = next(
        (at for at in range(shortest) if len({own[-1 - at] for own in lists}) > 1), shortest
    )
    behind = min(behind, shortest - before - 1)
    return {task: own[before : len(own) - max(behind, 0)] or own for task, own in words.items()}


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\W_]+", name.lower()) if word)
