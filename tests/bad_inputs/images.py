"""Images that cannot be read, and image processors that make others than the model reads."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from tests.bad_inputs.bad import Bad, broken_json, json_fields, nested, recipe_field, shown, written
from tests.bad_inputs.suites import replace
from tests.references import save_image

PROCESSOR = "base/preprocessor_config.json"
IMAGE = "shape.cal/class 1/3.png"

NAN = float("nan")

FIELDS: dict[str, list[Any]] = {
    "size": [
        {"height": 0, "width": 0},
        {"height": -16, "width": 16},
        {"height": 8, "width": 8},
        {"height": 16, "width": 32},
        {"height": 10**9, "width": 10**9},
        {"height": "x", "width": 16},
        {"height": 16.5, "width": 16},
        {"height": None, "width": 16},
        {"shortest_edge": 20},
        {},
        8,
        -1,
        "x",
        [],
        {"depth": 5},
        {"height": NAN, "width": 16},
    ],
    "image_mean": [
        [0.5],
        [],
        [0.5] * 4,
        "x",
        {"a": 1},
        [NAN] * 3,
        [float("inf")] * 3,
        ["x"] * 3,
        None,
    ],
    "image_std": [[0.5], [], [0.5] * 4, "x", [0.0] * 3, [NAN] * 3, ["x"] * 3],
    "resample": [99, -1, "x", [2], 10**30],
    "rescale_factor": [NAN, float("inf"), "x", None, [1], 1e300],
    "image_processor_type": ["UnheardImageProcessor", 5],
    "do_resize": [False],
}
"""Fields and values of a processor that makes no images for the model, by field.

Without resizing the images below have another size.
"""


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad images and bad processors."""
    for field, values in FIELDS.items():
        for number, value in enumerate(values):
            name = f"processor-{field}-{number}-{shown(value)}"
            yield Bad(name, _processor(field, value), "images")
    text = (suites["images"] / PROCESSOR).read_text()
    for name, content in broken_json(text, generator, 4):
        if name not in ("huge-number", "deep-field"):
            yield Bad(f"processor-{name}", written(PROCESSOR, content), "images")
    yield Bad("processor-deep-size", _processor_text(f'{{"size": {nested()}, '), "images")
    yield Bad("processor-absent", _no_processor, "images")
    image = (suites["images"] / IMAGE).read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"not an image",
        "html": b"<!DOCTYPE html><html></html>",
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "random": generator.bytes(400),
        "signature-alone": image[:8],
        "header-alone": image[:33],
        "zero-wide": image[:16] + bytes(4) + image[20:],
        "huge": image[:16] + (10**9).to_bytes(4, "big") * 2 + image[24:],
        **{f"cut-{place}": image[:place] for place in map(int, generator.integers(9, 33, 5))},
    }.items():
        yield Bad(f"image-{name}", written(IMAGE, content), "images")
    for name, instead in {
        "dangling-link": lambda file: file.symlink_to("nowhere.png"),
        "link-to-itself": lambda file: file.symlink_to(file),
        "pipe": os.mkfifo,
        "line": lambda file: save_image(file, np.zeros((1000, 1, 3))),
    }.items():
        yield Bad(f"image-{name}", _instead(instead), "images")
    yield Bad("no-images", _folder({"class 0": [], "class 1": []}), "images")
    yield Bad("texts-alone", _folder({"class 0": ["a.txt"], "class 1": ["b.txt"]}), "images")
    yield Bad("folder-empty", _folder({}), "images")
    for field, value in {"label": "lable"}.items():
        damage = recipe_field(f"tasks.shape.test.{field}", value)
        yield Bad(f"unknown-{field}", damage, "images")
    yield Bad("more-classes-than-the-head", _more_classes, "images")
    yield Bad("absent", recipe_field("tasks.shape.calibration", "none"), "images")


def _processor(field: str, value: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for model in ("base", "shape", "colour"):
            json_fields(f"{model}/preprocessor_config.json", **{field: value})(root)
        if field == "do_resize":
            _resize_images(root)

    return damage


def _resize_images(root: Path) -> None:
    for file in sorted(root.glob("*/*/*.png")):
        file.unlink()
        save_image(file, np.zeros((20, 24, 3)))


def _processor_text(start: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        fields = json.loads((root / PROCESSOR).read_text())
        del fields["size"]
        replace(root / PROCESSOR, start + json.dumps(fields)[1:])

    return damage


def _no_processor(root: Path) -> None:
    for model in ("base", "shape", "colour"):
        (root / model / "preprocessor_config.json").unlink()


def _instead(make_it: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / IMAGE).unlink()
        make_it(root / IMAGE)

    return damage


def _folder(files: dict[str, list[str]]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / "other").mkdir()
        for name, contents in files.items():
            (root / "other" / name).mkdir()
            for file in contents:
                (root / "other" / name / file).write_text("text")
        recipe_field("tasks.shape.calibration", "other")(root)

    return damage


def _more_classes(root: Path) -> None:
    for number in range(2, 5):
        (root / "shape.test" / f"class {number}").mkdir()
        os.link(root / IMAGE, root / "shape.test" / f"class {number}" / "0.png")
