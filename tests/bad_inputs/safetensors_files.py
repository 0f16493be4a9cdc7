"""Weights that are damaged, of other models, or not numbers."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.random import Generator
from safetensors import SafetensorError
from safetensors.numpy import load

from tests.bad_inputs.bad import Bad, all_of, broken_json, nested, tensors
from tests.bad_inputs.suites import replace

FILE = "alpha/model.safetensors"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad weights of an expert, and of the base."""
    content = (suites["text"] / FILE).read_bytes()
    for name, changed in _contents(content, generator):
        assert is_bad(content, changed), name
        yield Bad(name, _write(FILE, changed))
    base = "base/model.safetensors"
    content = (suites["text"] / base).read_bytes()
    for name, changed in _drawn(content, generator, 10):
        yield Bad(f"base-{name}", _write(base, changed))
    for name, edit in _edits(generator):
        yield Bad(name, tensors(FILE, edit))
    for name, edit in _edits_of_base(generator):
        yield Bad(f"base-{name}", tensors(base, edit))
    # Both are finite, and their difference is not.
    ends = [
        tensors(file, lambda t, name=name, x=x: t.update({name: np.full((32, 32), x, np.float32)}))
        for file, name, x in ((FILE, QUERY, 3e38), (base, QUERY.removeprefix("bert."), -3e38))
    ]
    yield Bad("difference-over-float32", all_of(*ends))
    yield from _no_files()


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields weights with other values, and with the metadata of another tool: nothing is bad."""
    content = (suites["text"] / FILE).read_bytes()
    header, values = split(content)
    metadata = {"__metadata__": {"tool": "another", "format": "pt"}}
    yield Bad("metadata", _write(FILE, join(header | metadata, values)))
    place = len(content) - 4 * int(generator.integers(1, 1000))
    changed = content[:place] + struct.pack("<f", 0.5) + content[place + 4 :]
    assert not is_bad(content, changed)
    yield Bad("values", _write(FILE, changed))


def is_bad(healthy: bytes, changed: bytes) -> bool:
    """Returns whether the `safetensors` library cannot read it, or reads other tensors."""
    try:
        wanted, read = load(healthy), load(changed)
    except (SafetensorError, ValueError, KeyError, OverflowError):
        return True
    return read.keys() != wanted.keys() or any(
        read[name].shape != wanted[name].shape
        or read[name].dtype.kind not in "fV"
        or not np.isfinite(read[name].astype(np.float32)).all()
        for name in wanted
    )


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and the bytes of its values."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: bytes | dict[str, Any], values: bytes) -> bytes:
    """Returns a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: replace(root / name, content)


def _contents(content: bytes, generator: Generator) -> Iterator[tuple[str, bytes]]:
    """Yields contents of the file."""
    header, values = split(content)
    (length,) = struct.unpack_from("<Q", content)
    yield "empty", b""
    yield "seven-bytes", content[:7]
    yield "length-alone", content[:8]
    yield "no-tensors", join({}, b"")
    yield "metadata-alone", join({"__metadata__": {"format": "pt"}}, b"")
    yield "pickled", b"PK\x03\x04" + bytes(generator.bytes(500))
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>" * 4
    yield "lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n"
    yield "random", generator.bytes(4000)
    yield "zeros", bytes(4000)
    for name, size in {
        "zero": 0,
        "one": 1,
        "short": length - 9,
        "long": length + 9,
        "file": len(content),
        "over-100-mb": 10**8 + 1,
        "half-of-2^64": 2**63,
        "2^64": 2**64 - 1,
    }.items():
        yield f"length-{name}", struct.pack("<Q", size) + content[8:]
    text = json.dumps(header)
    for name, changed in broken_json(text, generator, 6):
        if name not in ("huge-number", "deep-field"):
            yield f"header-{name}", join(changed, values)
    entry = f'"{QUERY}": '
    yield (
        "header-deep-entry",
        join(text.replace(entry, f'{entry}{nested()},"x":', 1).encode(), values),
    )
    yield "header-deep-metadata", join(f'{{"__metadata__":{nested()},{text[1:]}'.encode(), values)
    for name, fields in {
        "dtype-unknown": {"dtype": "F31"},
        "dtype-of-4-bits": {"dtype": "F4"},
        "dtype-number": {"dtype": 32},
        "dtype-null": {"dtype": None},
        "dtype-int": {"dtype": "I32"},
        "dtype-wider": {"dtype": "F64"},
        "dtype-complex": {"dtype": "C64"},
        "shape-negative": {"shape": [-32, -32]},
        "shape-text": {"shape": "32x32"},
        "shape-fraction": {"shape": [32.5, 32]},
        "shape-null": {"shape": None},
        "shape-huge": {"shape": [2**62, 2**62]},
        "shape-over-64-bits": {"shape": [2**70, 0]},
        "shape-empty-axis": {"shape": [0, 32]},
        "shape-flat": {"shape": [1024]},
        "shape-other": {"shape": [16, 64]},
        "shape-many-axes": {"shape": [32, 32] + [1] * 70},
        "offsets-reversed": {"data_offsets": header[QUERY]["data_offsets"][::-1]},
        "offsets-negative": {"data_offsets": [-4096, 0]},
        "offsets-beyond": {"data_offsets": [2**40, 2**40 + 4096]},
        "offsets-over-64-bits": {"data_offsets": [2**70, 2**70 + 4096]},
        "offsets-shared": {"data_offsets": header["classifier.bias"]["data_offsets"]},
        "offsets-one": {"data_offsets": [0]},
        "offsets-three": {"data_offsets": [0, 1, 2]},
        "offsets-null": {"data_offsets": None},
        "offsets-fraction": {"data_offsets": [0.5, 4096.5]},
    }.items():
        yield f"entry-{name}", join(header | {QUERY: header[QUERY] | fields}, values)
    for field in header[QUERY]:
        kept = {name: value for name, value in header[QUERY].items() if name != field}
        yield f"entry-without-{field}", join(header | {QUERY: kept}, values)
    yield "entry-list", join(header | {QUERY: [1]}, values)
    yield "entry-null", join(header | {QUERY: None}, values)
    for name, other in {
        "empty": "",
        "newline": "bert\nencoder",
        "escape": "\x1b[2J",
        "long": "x" * 100_000,
        "parent-folder": "../../x",
        "with-a-star": "bert.encoder.layer.*.attention.self.query.weight",
        "percent": "%s%n{0}",
        "right-to-left": "\u202eweight",
    }.items():
        renamed = {other if old == QUERY else old: entry for old, entry in header.items()}
        yield f"name-{name}", join(renamed, values)
    yield from _drawn(content, generator, 20)


def _drawn(content: bytes, generator: Generator, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields contents with drawn damages that the `safetensors` library confirms."""
    (length,) = struct.unpack_from("<Q", content)
    drawn = 0
    while drawn < count:
        place, byte = int(generator.integers(8 + length)), int(generator.integers(256))
        name, changed = (
            (f"flip-{place}-{byte}", content[:place] + bytes([byte]) + content[place + 1 :]),
            (f"drop-{place}", content[:place] + content[place + 1 :]),
            (f"cut-{place}", content[: int(generator.integers(len(content)))]),
            (f"longer-{byte}", content + bytes([byte]) * (1 + place)),
        )[generator.integers(4)]
        if is_bad(content, changed):
            drawn += 1
            yield f"drawn-{drawn}-{name}", changed


def _edits(generator: Generator) -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], object]]]:
    """Yields changes of an expert's tensors that make it no expert of the base."""

    def setter(tensor: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
        return lambda t: (
            t[tensor].reshape(-1).__setitem__(generator.integers(t[tensor].size), value)
        )

    for value in (np.nan, np.inf, -np.inf):
        for tensor in (QUERY, "bert.embeddings.word_embeddings.weight", "classifier.bias"):
            yield f"{value}-in-{tensor}", setter(tensor, value)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        whole = np.dtype(dtype).name
        yield (
            f"nan-in-{whole}",
            lambda t, dtype=dtype: t.update({QUERY: np.full_like(t[QUERY], np.nan, dtype)}),
        )
    yield "over-float32", lambda t: t.update({QUERY: np.full((32, 32), 1e300)})
    for dtype in (np.int8, np.int32, np.uint8, np.bool_, np.int64):
        name = np.dtype(dtype).name
        yield f"stored-as-{name}", lambda t, d=dtype: t.update({QUERY: t[QUERY].astype(d)})
    yield "missing", lambda t: t.pop(QUERY)
    yield "missing-head", lambda t: t.pop("classifier.weight")
    yield "extra", lambda t: t.update(extra=np.zeros(3, np.float32))
    yield "renamed", lambda t: t.update({"query": t.pop(QUERY)})
    yield (
        "transposed-table",
        lambda t: t.update(
            {"bert.embeddings.word_embeddings.weight": np.zeros((32, 205), np.float32)}
        ),
    )
    yield "another-size", lambda t: t.update({QUERY: np.zeros((32, 16), np.float32)})
    yield "scalar", lambda t: t.update({QUERY: np.array(1, np.float32)})
    yield "empty-tensor", lambda t: t.update({QUERY: np.zeros((0, 32), np.float32)})
    yield "no-entries", lambda t: t.update({QUERY: np.zeros(0, np.float32)})
    yield (
        "vocabulary-longer",
        lambda t: t.update(
            {"bert.embeddings.word_embeddings.weight": np.zeros((209, 32), np.float32)}
        ),
    )
    yield (
        "head-of-more-classes",
        lambda t: t.update(
            {
                "classifier.weight": np.zeros((9, 32), np.float32),
                "classifier.bias": np.zeros(9, np.float32),
            }
        ),
    )
    yield "head-of-a-half", lambda t: t.update({"classifier.bias": np.zeros(2, np.float32)})
    yield "third-layer", lambda t: t.update({QUERY.replace(".1.", ".2."): t[QUERY].copy()})
    yield "layer-lost", lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name]
    yield "nothing-left", lambda t: t.clear()
    yield "head-alone", lambda t: [t.pop(name) for name in list(t) if "classifier" not in name]


def _edits_of_base(
    generator: Generator,
) -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], object]]]:
    query = QUERY.removeprefix("bert.")
    yield "nan", lambda t: t[query].__setitem__((3, 4), np.nan)
    yield "inf", lambda t: t[query].__setitem__((3, 4), np.inf)
    yield "missing", lambda t: t.pop(query)
    yield "integers", lambda t: t.update({query: t[query].astype(np.int32)})
    yield "another-size", lambda t: t.update({query: np.zeros((16, 32), np.float32)})
    yield "nothing-left", lambda t: t.clear()


def _no_files() -> Iterator[Bad]:
    """Yields names where a file is expected and none can be read."""

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def damage(root: Path) -> None:
            (root / FILE).unlink()
            make(root / FILE)

        return damage

    yield Bad("absent", lambda root: (root / FILE).unlink())
    yield Bad("folder", instead(Path.mkdir))
    yield Bad("dangling-link", instead(lambda file: file.symlink_to("nowhere")))
    yield Bad("link-to-itself", instead(lambda file: file.symlink_to(file)))
    yield Bad("pipe", instead(os.mkfifo))
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.gguf", "flax_model.msgpack"):
        yield Bad(
            f"only-{name}", lambda root, name=name: (root / FILE).rename(root / "alpha" / name)
        )
