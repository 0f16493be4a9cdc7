import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from adamerge_jax.data.image_processors import load_image_processor
from adamerge_jax.errors import InputError


def save(folder: Path, **fields) -> Path:
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; expected a number for each of .* 3"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is"),
        ({"image_mean": "0.5"}, "image_mean is '0.5'"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is .*above 0"),
        ({"image_std": [0.5, None, 0.5]}, "image_std is"),
        ({"size": {"height": 0, "width": 0}}, "size.height is 0; expected pixels"),
        ({"size": {"height": 8, "width": -8}}, "size.width is -8"),
        ({"size": {"height": 8, "width": 8.5}}, "size.width is 8.5"),
        ({"size": {"height": 10**9, "width": 8}}, "size.height is 1000000000"),
        ({"size": "8"}, "size is '8'"),
        ({"resample": 99}, "resample is 99; expected one of Pillow's filters"),
        ({"resample": "cubic"}, "resample is 'cubic'"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; expected true or false"),
        ({"size": {"height": 16, "width": 16}}, r"\(3, 16, 16\), the model takes \(3, 8, 8\)"),
        ({"image_mean": [1e39] * 3, "image_std": [1e-39] * 3}, "NaN or infinity|fails"),
        ({"size": {"wide": 8}}, "wide|fails|cannot be read"),
    ],
)
def test_impossible_fields(tmp_path, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        load_image_processor(save(tmp_path, **fields), "base (b)", (3, 8, 8))
    assert str(caught.value).startswith("base (b): ") and "\n" not in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\udc80", '"a"'])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"base \(b\): its preprocessor_config.json"):
        load_image_processor(tmp_path, "base (b)", (3, 8, 8))


def test_images_of_the_right_size_need_no_resizing(tmp_path):
    processor = load_image_processor(save(tmp_path, do_resize=False), "base (b)", (3, 8, 8))
    image = Image.new("RGB", (8, 8))
    assert processor.preprocess(images=[image], return_tensors="np")["pixel_values"][0].shape == (
        3,
        8,
        8,
    )


def test_other_numbers_of_channels(tmp_path):
    save(tmp_path, image_mean=[0.5], image_std=[0.5])
    processor = load_image_processor(tmp_path, "base (b)", (1, 8, 8))
    assert processor.mode == "L"
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    pixels = processor.preprocess(images=[ramp], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels[0].ravel(), np.arange(64) / 127.5 - 1, atol=1e-6)
    save(tmp_path, image_mean=[0.5] * 5, image_std=[0.5] * 5)
    with pytest.raises(InputError, match="takes images of 5 channels, image files have 1, 3 or 4"):
        load_image_processor(tmp_path, "base (b)", (5, 8, 8))
