"""A strict YAML reader: what a person overlooks is refused, and so is what would take for ever.

YAML says little of its mistakes: of a key that is given twice the last one counts, `no` is a truth
value and 2023 a number, and a few nested aliases stand for more memory than there is.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from adamerge_jax.errors import InputError, shorten

_LARGEST = 10_000_000
"""The largest size of a file in bytes."""

_DEEPEST = 50
"""The largest depth of sections within sections."""

_MOST_NODES = 500_000
"""The largest number of values, before and after all aliases are followed. A file of mergekit has
five for each expert and tensor that has a weight of its own."""

_LONGEST_NUMBER = 40
"""The largest number of characters of an integer."""


def read_yaml(text: str | bytes) -> Any:
    """Parses YAML.

    Args:
        text: The YAML document.

    Returns:
        Its dictionaries, whose keys are all text, lists, strings and numbers.

    Raises:
        InputError: It is not YAML, a key is given twice or is no text, or it is nested too deep or
            too large.
    """
    return _parse(text, _Loader)


def read_metadata(text: str) -> Any:
    """Parses YAML that a person wrote for other readers, such as that of a README.md.

    Within the same limits as `read_yaml`; keys may be numbers and truth values, or given twice.

    Raises:
        InputError: It is not YAML, or it is nested too deep or too large.
    """
    return _parse(text, _BoundedLoader)


def read_yaml_file(file: Path) -> Any:
    """Parses a YAML file; see `read_yaml`.

    Raises:
        InputError: Names the file, which cannot be read or is refused.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"larger than {_LARGEST:,} bytes, which no file written by hand is")
        if not file.is_file():  # a pipe would be waited for, a device gives bytes for ever
            raise InputError("is no file; expected a YAML file")
        return read_yaml(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _parse(text: str | bytes, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is of a tag: !!int "x"
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})") from error


class _BoundedLoader(yaml.SafeLoader):
    """Reads within limits."""

    _depth = 0
    _nodes = 0

    def get_single_node(self) -> yaml.Node | None:
        """Returns the document, before anything is made of it."""
        document = super().get_single_node()
        if document is not None:
            _count(document, {})
        return document

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Returns the next value; PyYAML itself goes as deep as the file does."""
        self._depth += 1
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise _Refusal(f"it has more than {_MOST_NODES:,} values", self.peek_event())
        if self._depth > _DEEPEST:
            raise _Refusal(f"it is nested deeper than {_DEEPEST} levels", self.peek_event())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Returns an integer; printing one of thousands of digits takes long or fails."""
        if len(node.value) > _LONGEST_NUMBER:
            raise _Refusal(f"{shorten(node.value, 60)} is too long for a number", node)
        return self.construct_yaml_int(node)


class _Loader(_BoundedLoader):
    """Reads strictly; 1e-3 is a number as in YAML 1.2, not a text as in YAML 1.1."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Returns the next mapping, each of whose keys is a text of its own."""
        mapping = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue  # PyYAML refuses keys that are lists or mappings
            if key.tag != _TEXT:
                raise _Refusal(
                    f"the key {shorten(key.value, 60)} is no text to YAML; put it in quotes", key
                )
            if key.value in lines:
                raise _Refusal(
                    f"the key {shorten(key.value, 60)!r} is given twice, first in line "
                    f"{lines[key.value]}; keep one of the two",
                    key,
                )
            lines[key.value] = key.start_mark.line + 1
        return mapping


_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"

_OTHERWISE = {f"{_TAG}{kind}" for kind in ("timestamp", "int", "float")}
"""The tags that plain texts get otherwise than in PyYAML, or not at all."""

# Dates, sets and bytes are no values of JSON, which is all that is written in YAML here.
_Loader.yaml_constructors = {
    tag: _Loader.yaml_constructors[tag]
    for tag in (None, *(_TAG + kind for kind in ("null", "bool", "float", "str", "seq", "map")))
}
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] not in _OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for loader in (_BoundedLoader, _Loader):
    loader.add_constructor(f"{_TAG}int", loader.construct_int)
# Without 1:30, which is 90 in YAML 1.1.
_Loader.add_implicit_resolver(
    f"{_TAG}int",
    re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)$|[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


class _Refusal(yaml.MarkedYAMLError):
    """A mistake with its line."""

    def __init__(self, problem: str, place: yaml.Node | yaml.Event):
        super().__init__(problem=problem, problem_mark=place.start_mark)

    def __str__(self) -> str:
        return f"line {self.problem_mark.line + 1}: {self.problem}"


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Returns the number of values in a node, those behind aliases as often as they are used.

    Args:
        node: The node.
        counts: The numbers that are known by the id of a node; None while one is being counted.
    """
    counted = counts.get(id(node), 0)
    if counted is None:
        raise _Refusal("a section contains itself", node)
    if counted:
        return counted
    counts[id(node)] = None
    total = 1
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        for child in (part for item in node.value for part in (item if pairs else (item,))):
            total += _count(child, counts)
            if total > _MOST_NODES:
                raise _Refusal(f"it has more than {_MOST_NODES:,} values", node)
    counts[id(node)] = total
    return total
