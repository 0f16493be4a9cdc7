"""NumPy files that are damaged, pickled, or hold what the model cannot read."""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from tests.bad_inputs.bad import Bad, recipe_field
from tests.bad_inputs.suites import replace


class Trap:
    """What a pickle makes a file of, if it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("unpickled"),)


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad arrays of texts and of images."""
    ids = generator.integers(5, 200, (24, 8))
    ones = np.ones_like(ids)
    text: dict[str, dict[str, Any]] = {
        "without-ids": {"attention_mask": ones},
        "of-another-name": {"ids": ids},
        "pixels-for-a-text": {"pixel_values": np.zeros((24, 3, 16, 16), np.float32)},
        "nothing": {},
        "no-examples": {"input_ids": ids[:0]},
        "few": {"input_ids": ids[:3]},
        "no-tokens": {"input_ids": ids[:, :0]},
        "one-axis": {"input_ids": ids[0]},
        "three-axes": {"input_ids": ids[None]},
        "scalar": {"input_ids": np.array(5)},
        "too-long": {"input_ids": np.ones((24, 33), int)},
        "id-negative": {"input_ids": np.where(np.arange(8) == 3, -1, ids)},
        "id-over-the-table": {"input_ids": np.where(np.arange(8) == 3, 205, ids)},
        "id-of-2^40": {"input_ids": np.where(np.arange(8) == 3, 2**40, ids)},
        "ids-unsigned-2^63": {"input_ids": np.full((24, 8), 2**63 + 7, np.uint64)},
        "ids-fractions": {"input_ids": ids + 0.5},
        "ids-floats": {"input_ids": ids.astype(np.float32)},
        "ids-nan": {"input_ids": np.full((24, 8), np.nan)},
        "ids-bools": {"input_ids": ids > 50},
        "ids-complex": {"input_ids": ids.astype(complex)},
        "ids-texts": {"input_ids": ids.astype("U5")},
        "ids-dates": {"input_ids": ids.astype("datetime64[s]")},
        "ids-records": {"input_ids": np.zeros((24, 8), [("a", int)])},
        "ids-void": {"input_ids": np.zeros((24, 8), "V4")},
        "mask-nan": {"input_ids": ids, "attention_mask": np.full((24, 8), np.nan)},
        "mask-one-nan": {
            "input_ids": ids,
            "attention_mask": np.where(ids == ids[3, 3], np.nan, 1.0),
        },
        "mask-inf": {"input_ids": ids, "attention_mask": np.full((24, 8), np.inf)},
        "mask-negative": {"input_ids": ids, "attention_mask": -ones},
        "mask-of-2": {"input_ids": ids, "attention_mask": 2 * ones},
        "mask-fractions": {"input_ids": ids, "attention_mask": 0.5 * ones},
        "mask-all-0": {"input_ids": ids, "attention_mask": 0 * ones},
        "mask-texts": {"input_ids": ids, "attention_mask": ones.astype("U1")},
        "mask-shorter": {"input_ids": ids, "attention_mask": ones[:, :5]},
        "mask-of-fewer": {"input_ids": ids, "attention_mask": ones[:5]},
        "mask-one-axis": {"input_ids": ids, "attention_mask": ones[:, 0]},
        "types-of-2": {"input_ids": ids, "token_type_ids": 2 * ones},
        "types-of-9": {"input_ids": ids, "token_type_ids": 9 * ones},
        "types-negative": {"input_ids": ids, "token_type_ids": -ones},
        "types-fractions": {"input_ids": ids, "token_type_ids": 0.5 * ones},
        "types-nan": {"input_ids": ids, "token_type_ids": np.full((24, 8), np.nan)},
        "types-shorter": {"input_ids": ids, "token_type_ids": 0 * ones[:, :3]},
    }
    for name, arrays in text.items():
        yield Bad(f"text-{name}", _texts(_npz(arrays)))
    classes = ids[:, 0] % 3
    labels: dict[str, Any] = {
        "absent": None,
        "negative": classes - 1 - (classes == 0),
        "over-the-head": classes + 1,
        "fractions": classes + 0.5,
        "floats": classes * 1.5 + 0.25,
        "nan": np.full(24, np.nan),
        "texts": classes.astype("U1"),
        "bools": classes == 1,
        "2^40": classes + 2**40,
        "two-axes": np.stack([classes, classes], 1),
        "one-hot": np.eye(3, dtype=int)[classes],
        "fewer": classes[:7],
        "scalar": np.array(1),
    }
    for name, values in labels.items():
        arrays = {"input_ids": ids} | ({} if values is None else {"label": values})
        yield Bad(f"labels-{name}", _texts(_npz(arrays), part="test"))
    pixels = generator.normal(size=(24, 3, 16, 16)).astype(np.float32)
    images: dict[str, Any] = {
        "of-another-size": pixels[..., :8],
        "one-channel": pixels[:, :1],
        "channels-last": pixels.transpose(0, 2, 3, 1),
        "three-axes": pixels[:, 0],
        "five-axes": pixels[None],
        "nan": np.where(pixels == pixels[3, 1, 4, 4], np.nan, pixels),
        "all-nan": np.full_like(pixels, np.nan),
        "inf": np.where(pixels == pixels[3, 1, 4, 4], np.inf, pixels),
        "over-float32": pixels.astype(np.float64) * 1e300,
        "texts": np.full((24, 3, 16, 16), "a"),
        "complex": pixels.astype(complex),
        "no-examples": pixels[:0],
    }
    for name, values in images.items():
        damage = _arrays("shape", _npz({"pixel_values": values}), "calibration")
        yield Bad(f"pixels-{name}", damage, "images")
    yield from _files(ids, generator)


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields arrays that are as they should be."""
    ids = generator.integers(5, 200, (24, 8))
    ones = np.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}
    yield Bad("texts", _texts(_npz(whole)))
    yield Bad("labels", _texts(_npz({"input_ids": ids, "label": ids[:, 0] % 3}), part="test"))
    pixels = generator.normal(size=(24, 3, 16, 16)).astype(np.float32)
    yield Bad("pixels", _arrays("shape", _npz({"pixel_values": pixels}), "calibration"), "images")


def _files(ids: np.ndarray, generator: Generator) -> Iterator[Bad]:
    whole = _npz({"input_ids": ids})
    yield Bad("file-empty", _texts(b""))
    yield Bad("file-text", _texts(b"w1 w2"))
    yield Bad("file-random", _texts(generator.bytes(500)))
    yield Bad("file-zip-empty", _texts(_zip({})))
    yield Bad("file-zip-of-texts", _texts(_zip({"input_ids.txt": b"5"})))
    yield Bad("file-zip-of-garbage", _texts(_zip({"input_ids.npy": b"garbage"})))
    yield Bad("file-zip-of-empty", _texts(_zip({"input_ids.npy": b""})))
    for number in range(6):
        place = int(generator.integers(1, len(whole)))
        yield Bad(f"file-cut-{number}-at-{place}", _texts(whole[:place]))
    header = _npy(ids)
    for name, old, new in (
        ("shape-huge", b"(24, 8)", b"(2400000000000, 80000000)"),
        ("shape-negative", b"(24, 8)", b"(-24, 8)"),
        ("shape-longer", b"(24, 8)", b"(99, 8)"),
        ("dtype-unknown", b"'<i8'", b"'<i9'"),
        ("dtype-object", b"'<i8'", b"'|O'"),
        ("not-literal", b"{'descr'", b"{__import__('os').system('true'):1,'descr'"),
        ("no-magic", b"\x93NUMPY", b"\x93NUMPI"),
        ("version", b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
    ):
        assert old in header, name
        changed = header.replace(old, new, 1)
        yield Bad(f"array-{name}", _texts(_zip({"input_ids.npy": _with_length(changed)})))
    trap = np.array([Trap()] * 24, object)
    for name, arrays in {
        "ids": {"input_ids": trap},
        "label": {"input_ids": ids, "label": trap},
        "mask": {"input_ids": ids, "attention_mask": trap},
    }.items():
        yield Bad(
            f"pickled-{name}",
            _texts(_npz(arrays), part="test" if name == "label" else "calibration"),
        )
    bomb = np.zeros((1, 2 * 10**7), np.int64)
    yield Bad("bomb", _texts(_npz({"input_ids": bomb})))


def _texts(content: bytes, part: str = "calibration") -> Callable[[Path], None]:
    return _arrays("alpha", content, part)


def _arrays(task: str, content: bytes, part: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        replace(root / "data.npz", content)
        source = {"path": "data.npz"} | ({"label": "label"} if part == "test" else {})
        recipe_field(f"tasks.{task}.{part}", source)(root)

    return damage


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _with_length(content: bytes) -> bytes:
    """Sets the length of a changed header in an .npy file, which ends with a line break."""
    if not content.startswith(b"\x93NUMPY\x01"):
        return content
    end = content.index(b"\n") + 1
    return content[:8] + (end - 10).to_bytes(2, "little") + content[10:]


def _zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()
