"""A bad input: a suite, what is damaged in it, and the command that must refuse it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.random import Generator
from safetensors.numpy import load_file, save_file

from tests.bad_inputs.suites import read_recipe, replace

LEARN = "learn recipe.yaml --out out"

DEEP = 100_000
"""A nesting that no reader follows: far over Python's recursion limit."""


class Bad(NamedTuple):
    """A bad input.

    Attributes:
        name: Its name, unique within its kind.
        damage: Changes a copy of the suite, whose folder it is given.
        suite: Name of the suite.
        command: The command line, run in the copy.
    """

    name: str
    damage: Callable[[Path], object]
    suite: str = "text"
    command: str = LEARN


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Returns the damage of a file that has another content."""
    return lambda root: replace(root / name, content)


def json_fields(name: str, **fields: Any) -> Callable[[Path], None]:
    """Returns the damage of a JSON file that has other fields; `...` removes one."""

    def damage(root: Path) -> None:
        changed = json.loads((root / name).read_text()) | fields
        kept = {field: value for field, value in changed.items() if value is not ...}
        replace(root / name, json.dumps(kept))

    return damage


def recipe_field(path: str, value: Any) -> Callable[[Path], None]:
    """Returns the damage of a recipe with another value of a field, such as `learning.steps`."""

    def damage(root: Path) -> None:
        fields = section = read_recipe(root)
        *sections, field = path.split(".")
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
        replace(root / "recipe.yaml", yaml.safe_dump(fields, sort_keys=False))

    return damage


def tensors(
    name: str,
    edit: Callable[[dict[str, np.ndarray]], object],
    metadata: Mapping[str, str] | None = None,
) -> Callable[[Path], None]:
    """Returns the damage of a safetensors file whose tensors are others."""

    def damage(root: Path) -> None:
        changed = load_file(root / name)
        edit(changed)
        (root / name).unlink()
        save_file(changed, root / name, metadata=dict(metadata or {"format": "pt"}))

    return damage


def all_of(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    """Returns several damages as one."""

    def damage(root: Path) -> None:
        for one in damages:
            one(root)

    return damage


def broken_json(text: str, generator: Generator, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields contents that are no JSON of the right kind, `count` of them drawn.

    Python's own reader decides: what it still reads is not yielded.
    """
    content = text.encode()
    yield "empty", b""
    yield "blank", b" \n"
    yield "deep-list", b"[" * DEEP + b"]" * DEEP
    yield "deep-fields", b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield "deep-field", b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"," + content.lstrip()[1:]
    yield "number", b"3"
    yield "null", b"null"
    yield "text", b'"fields"'
    yield "list", b"[1, 2]"
    yield "html", b"<!DOCTYPE html><html><body>Not found</body></html>"
    yield "lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    yield "nul-bytes", b"\0" * 64
    yield "not-utf-8", content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :]
    yield "lone-surrogate-half", content.replace(b'": "', b'": "\xed\xa0\x80', 1)
    yield "huge-number", b'{"a": ' + b"9" * 5000 + b"," + content.lstrip()[1:]
    yield "twice", content + content
    drawn = 0
    while drawn < count:
        place = int(generator.integers(1, len(content) - 1))
        cut = bool(generator.integers(2))
        changed = content[:place] if cut else content[:place] + b'"' + content[place + 1 :]
        try:
            json.loads(changed)
        except ValueError:
            drawn += 1
            yield f"{'cut' if cut else 'quote'}-at-{place}", changed


def nested(levels: int = DEEP) -> str:
    """Returns JSON of so many lists, one in the other."""
    return "[" * levels + "]" * levels


def shown(value: Any) -> str:
    """Returns the beginning of a value, for a name."""
    return "missing" if value is ... else repr(value)[:24]
