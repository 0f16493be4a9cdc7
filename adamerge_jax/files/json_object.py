"""Objects and lists of JSON files, whoever wrote them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError, in_one_line

_LARGEST = 100_000_000
"""The largest size of a file in bytes; the indexes of the largest models have 20 million."""


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        InputError: It cannot be read, is no JSON or no UTF-8, is nested too deep, or holds
            something else than an object, or is too large.
    """
    return _read(file, dict, "fields")


def read_object_if_there(file: Path) -> dict[str, Any]:
    """Reads a JSON file as `read_object` does; returns an empty object where there is no file."""
    return read_object(file) if file.is_file() else {}


def read_list(file: Path) -> list[Any]:
    """Reads a JSON file that holds a list.

    Raises:
        InputError: It cannot be read, is no JSON or no UTF-8, is nested too deep, or holds
            something else than a list, or is too large.
    """
    return _read(file, list, "list")


def write_json(file: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes an object or a list to a JSON file, a line for each field.

    Args:
        file: The file, in a folder that nobody reads yet; `write_whole` is for all others.
        content: The object or list.
    """
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(file: Path, kind: type, in_words: str) -> Any:
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not JSON: {in_one_line(error)}; copy or download it again"
        ) from error
    if not isinstance(content, kind):
        raise InputError(
            f"{file} holds no {in_words} (but {type(content).__name__}); copy or download it again"
        )
    return content
