"""The README.md of a data set's repository: its configurations, splits and classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge_jax.data.listing import in_words, split_of
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.strict_yaml import read_metadata

_LARGEST = 2**20
"""Bytes of a README.md that are read: its metadata are at its beginning."""


@dataclasses.dataclass(frozen=True)
class Card:
    """The metadata of a data set.

    Attributes:
        file: The README.md.
        configs: The configurations that name files, in their order.
        infos: The facts about each configuration.
    """

    file: Path
    configs: list[Mapping[str, Any]]
    infos: list[Mapping[str, Any]]

    def files_of(self, config: str | None, split: str) -> list[str]:
        """Returns the patterns of the files of a split.

        Raises:
            InputError: There is no such configuration or split.
        """
        files = self._config(config)["data_files"]
        if _are_patterns(files):
            files = {"train": files}
        elif isinstance(files, Mapping):
            files = {str(name): patterns for name, patterns in files.items()}
        else:
            files = {str(part.get("split")): part.get("path") for part in _mappings(files)}
        patterns: Any = next((files[name] for name in files if _same_split(name, split)), None)
        if not _are_patterns(patterns):
            raise InputError(
                f"{self.file} names no files for split {split!r}; its splits are "
                f"{in_words(files) or 'none'}"
            )
        return [patterns] if isinstance(patterns, str) else patterns

    def facts_of(self, config: str | None, split: str) -> tuple[int | None, dict[str, list[str]]]:
        """Returns the number of examples of a split and the names of classes by column, if told."""
        name = self._config(config).get("config_name", "default")
        fitting = (info for info in self.infos if info.get("config_name", "default") == name)
        info = next(fitting, {})
        examples = None
        for part in _mappings(info.get("splits")):
            if _same_split(str(part.get("name")), split):
                count = part.get("num_examples")
                examples = count if isinstance(count, int) else None
        class_names = {}
        for feature in _mappings(info.get("features")):
            dtype = next(filter(None, map(feature.get, ("dtype", "sequence", "list"))), None)
            label = dtype.get("class_label") if isinstance(dtype, Mapping) else None
            names = label.get("names") if isinstance(label, Mapping) else None
            if isinstance(names, Mapping):
                if not all(str(key).isdecimal() for key in names):
                    raise InputError(
                        f"{self.file} names classes by other keys than their numbers "
                        f"({in_words(map(str, names))}); give the file of the data"
                    )
                names = [names[key] for key in sorted(names, key=int)]
            if isinstance(names, list):
                class_names[str(feature.get("name"))] = [str(class_name) for class_name in names]
        return examples, class_names

    def _config(self, name: str | None) -> Mapping[str, Any]:
        names = [str(config.get("config_name", "default")) for config in self.configs]
        if name is None:
            chosen = [config for config in self.configs if config.get("default") is True]
            chosen = chosen or self.configs[: len(names) == 1]
            name = "default"
        else:
            chosen = []
        chosen = chosen or [
            config for config in self.configs if config.get("config_name", "default") == name
        ]
        if not chosen:
            raise InputError(
                f"{self.file} has the configurations {in_words(names)}; give one of them as config"
            )
        return chosen[0]


def read_card(folder: Path) -> Card | None:
    """Reads the README.md of a folder; None if it has no metadata.

    Raises:
        InputError: Its metadata cannot be read.
    """
    file = folder / "README.md"
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        text = stream.read(_LARGEST).decode("utf-8", errors="replace")
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return None
    try:
        fields = read_metadata("\n".join(lines[1 : lines.index("---", 1)]))
        if not isinstance(fields, Mapping):
            return None
        configs = [c for c in _mappings(fields.get("configs")) if c.get("data_files")]
        return Card(file, configs, _mappings(fields.get("dataset_info")))
    except InputError as error:
        raise InputError(
            f"{file}: its metadata cannot be read: {in_one_line(error)}; give the file of the data"
        ) from error


def _are_patterns(value: Any) -> bool:
    """Returns True for a pattern of files, or a list of them."""
    patterns = value if isinstance(value, list) else [value]
    return bool(patterns) and all(isinstance(pattern, str) and pattern for pattern in patterns)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """Returns a list of mappings that may be written as one alone."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, Mapping)]


def _same_split(first: str, second: str) -> bool:
    return first == second or (split_of(first) or first) == (split_of(second) or second)
