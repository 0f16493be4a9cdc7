"""Indexes of sharded weights that are damaged, or name what they should not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.random import Generator
from safetensors.numpy import load_file

from tests.bad_inputs.bad import Bad, broken_json
from tests.bad_inputs.safetensors_files import FILE, QUERY
from tests.bad_inputs.suites import replace

SHARD = "model-00001-of-00001.safetensors"
INDEX = "alpha/model.safetensors.index.json"


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad indexes of an expert."""
    names = list(load_file(suites["text"] / FILE))
    weight_map: dict[str, Any] = dict.fromkeys(names, SHARD)
    healthy = {"metadata": {"total_size": 100}, "weight_map": weight_map}
    for name, content in broken_json(json.dumps(healthy), generator, 6):
        if name not in ("deep-field", "huge-number"):
            yield Bad(name, _indexed(content))
    yield Bad("deep-weight-map", _indexed(f'{{"weight_map": {"[" * 10**5}{"]" * 10**5}}}'))
    for name, changed in {
        "no-weight-map": {"metadata": {}},
        "weight-map-list": {"weight_map": names},
        "weight-map-null": {"weight_map": None},
        "weight-map-text": {"weight_map": SHARD},
        "weight-map-empty": {"weight_map": {}},
        "shards-numbers": {"weight_map": dict.fromkeys(names, 1)},
        "shards-lists": {"weight_map": {name: [SHARD] for name in names}},
        "one-shard-null": {"weight_map": weight_map | {QUERY: None}},
        "tensor-lost": {"weight_map": {n: s for n, s in weight_map.items() if n != QUERY}},
        "tensor-invented": {"weight_map": weight_map | {"bert.invented": SHARD}},
    }.items():
        yield Bad(name, _indexed(json.dumps(changed)))
    for name, shard in {
        "empty": "",
        "this-folder": ".",
        "parent-folder": "..",
        "absolute": "/etc/passwd",
        "parent": "../beta/model.safetensors",
        "below": "deeper/model.safetensors",
        "backslash": "..\\beta\\model.safetensors",
        "300-characters": "x" * 300,
        "5000-characters": "x" * 5000,
        "nul": f"a\0{SHARD}",
        "newline": f"a\n{SHARD}",
        "escape": f"\x1b[31m{SHARD}",
        "surrogate": "\ud800.safetensors",
        "missing": "model-00002-of-00002.safetensors",
        "config": "config.json",
        "index-itself": Path(INDEX).name,
        "tilde": "~/model.safetensors",
        "address": "https://example.com/model.safetensors",
        "space": " ",
    }.items():
        changed = {"weight_map": weight_map | {QUERY: shard}}
        yield Bad(f"shard-{name}", _indexed(json.dumps(changed)))
    yield Bad("folder", _sharded(lambda root: (root / INDEX).mkdir()))
    yield Bad("shard-is-a-folder", _indexed(json.dumps(healthy), shard="folder"))
    yield Bad("shard-cut", _indexed(json.dumps(healthy), shard="cut"))
    yield Bad("absent", _sharded(lambda root: None))


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields the index that the bad ones are made of."""
    weight_map = dict.fromkeys(load_file(suites["text"] / FILE), SHARD)
    yield Bad("index", _indexed(json.dumps({"weight_map": weight_map})))


def _sharded(index: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / FILE).rename(root / "alpha" / SHARD)
        index(root)

    return damage


def _indexed(content: bytes | str, shard: str = "whole") -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        replace(root / INDEX, content)
        file = root / "alpha" / SHARD
        whole = file.read_bytes()
        if shard != "whole":
            file.unlink()
            file.mkdir() if shard == "folder" else file.write_bytes(whole[:5000])

    return _sharded(damage)
