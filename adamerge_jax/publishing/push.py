"""The upload of a merge to the Hugging Face Hub: a list of files first, then one commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adamerge_jax.errors import InputError, in_hand, in_one_line
from adamerge_jax.files.json_object import read_object
from adamerge_jax.files.strict_yaml import read_yaml_file
from adamerge_jax.files.writing import is_partial
from adamerge_jax.pipeline.export import CARD_FILE, CHECKPOINT_FOLDER
from adamerge_jax.publishing.card import published_card
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    HEAT_MAP_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    STATE_FOLDER,
)
from adamerge_jax.runs.results import read_results

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MERGE_FOLDER = "merge"
"""The folder on the Hub of what the merge is made again from. Beside the weights, its coefficients
would be taken for some of them."""

_OF_THE_MERGE = (COEFFICIENTS_FILE, RECIPE_FILE, RESULTS_FILE, HEAT_MAP_FILE)


class File(NamedTuple):
    """A file to upload.

    Attributes:
        name: Its path on the Hub.
        content: The file on this machine, or its content.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


class Upload(NamedTuple):
    """All that is uploaded.

    Attributes:
        repository: The id of the model on the Hub.
        files: The files.
        notes: Sentences on what their reader will see.
    """

    repository: str
    files: Sequence[File]
    notes: Sequence[str]

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)


def plan_upload(run: Path, repository: str) -> Upload:
    """Lists the files of a run that are uploaded; asks nobody.

    Args:
        run: The folder that `learn`, `search`, `merge` or `fold` has written.
        repository: The id of the model on the Hub, `org/name`.

    Raises:
        InputError: The run has not ended or has no checkpoint, a file cannot be read or is a link,
            or the id can be none.
    """
    _require_id(repository)
    checkpoint = run / CHECKPOINT_FOLDER
    if not (checkpoint / CARD_FILE).is_file():
        raise InputError(
            f"{run} has no {CHECKPOINT_FOLDER}/{CARD_FILE}; give the folder that `adamerge "
            "learn`, merge or fold has written"
        )
    if (run / STATE_FOLDER).exists():
        raise InputError(f"{run} is of a run that has not ended; go on with it (--resume) first")
    with in_hand(run / RESULTS_FILE):
        results = read_results(run / RESULTS_FILE)
    has_scores = bool(results.rows) or results.harness is not None
    card = _no_link(checkpoint / CARD_FILE).read_text(encoding="utf-8")
    files = [File(CARD_FILE, published_card(card, repository, results).encode())]
    files += [
        File(file.relative_to(checkpoint).as_posix(), _no_link(file))
        for file in _files_in(checkpoint)
        if file != checkpoint / CARD_FILE
    ]
    files += [
        File(f"{MERGE_FOLDER}/{name}", _no_link(run / name))
        for name in _OF_THE_MERGE
        if (run / name).is_file()
    ]
    return Upload(repository, files, _notes(run, card, files, has_scores=has_scores))


def push(upload: Upload, *, private: bool, force: bool, api: HfApi | None = None) -> str:
    """Uploads files in one commit, to a model that is made if it is not there.

    Args:
        upload: The files.
        private: True to make a model that only its owners see; one that is there stays as it is.
        force: True to write into a model that has files already.
        api: The client of the Hub; None for the usual one.

    Returns:
        The address of the commit.

    Raises:
        InputError: The Hub refuses, cannot be reached, or has such a model with files in it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    try:
        if not force and api.repo_exists(upload.repository):
            there = set(api.list_repo_files(upload.repository)) - {".gitattributes"}
            if there:
                raise InputError(
                    f"{upload.repository} is on the Hub and has {len(there)} files, such as "
                    f"{min(there)}; give another id, or --force to write into it"
                )
        api.create_repo(upload.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            upload.repository,
            [CommitOperationAdd(file.name, file.content) for file in upload.files],
            commit_message="Merge by adamerge_jax",
        )
    except InputError:
        raise
    # The client raises its own errors, those of its transport, and the system's.
    except Exception as error:
        raise InputError(
            f"cannot upload to {upload.repository}: {in_one_line(error)}; nothing is published "
            "before the last file has arrived"
        ) from error
    return commit.commit_url


def _require_id(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"{repository!r:.120} is no id of the Hub: {in_one_line(error)}"
        ) from error
    if "/" not in repository:
        raise InputError(f"{repository}: give the owner too, as in owner/{repository}")


def _files_in(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder, without hidden and half-written ones."""
    for file in sorted(folder.rglob("*")):
        names = file.relative_to(folder).parts
        hidden = any(name.startswith(".") or is_partial(Path(name)) for name in names)
        if file.is_file() and not hidden:
            yield file


def _no_link(file: Path) -> Path:
    """Returns a file of a run; no run has links, and a stranger's may lead to any file here."""
    if file.is_symlink():
        raise InputError(f"{file} is a link; put the file itself there, or take it away")
    return file


def _notes(run: Path, card: str, files: Sequence[File], *, has_scores: bool) -> list[str]:
    """Returns sentences on what a stranger will read, or miss."""
    notes = [] if has_scores else ["the card has no scores: the merge was not evaluated"]
    if (run / RECIPE_FILE).is_file():
        named_by = f"{MERGE_FOLDER}/{RECIPE_FILE}, the coefficients and the card"
        local = _local(_texts(read_yaml_file(run / RECIPE_FILE)))
    else:
        named_by = "the card and the coefficients"
        local = _local(re.findall("`([^`]+)`", card))
    if local is not None:
        notes.append(f"{named_by} name folders of this machine, such as {local}")
    for name, content in files:
        if isinstance(content, Path) and name.endswith("config.json"):
            local = _local(_texts(read_object(content)))
            if local is not None:
                notes.append(f"{name} names a folder of this machine, {local}")
    return notes


def _local(texts: Iterable[str]) -> str | None:
    """Returns the first text that is a path of this machine."""
    paths = (text for text in texts if text.isprintable() and Path(text).is_absolute())
    return next((path for path in paths if len(Path(path).parts) > 2), None)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _texts(member)
