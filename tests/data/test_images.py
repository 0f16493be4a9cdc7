import io
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from adamerge_jax.data.image_files import ImageFiles
from adamerge_jax.data.images import ImageExamples, ImageProcessor
from adamerge_jax.errors import InputError
from tests.references import save_image


def make(images, channels: int = 3, **fields) -> ImageExamples:
    half = [0.5] * channels
    size = dict(height=4, width=4)
    preprocess = ViTImageProcessorPil(size=size, image_mean=half, image_std=half, **fields)
    return ImageExamples(images, ImageProcessor(preprocess, (channels, 4, 4)), "data")


def pixels_of(examples: ImageExamples) -> np.ndarray:
    """The pixel values as integers from 0 to 255."""
    values = examples.take(np.arange(len(examples)), 0)["pixel_values"]
    return np.rint((values + 1) * 127.5).astype(int)


def test_a_model_of_one_channel(tmp_path):
    grey = np.arange(16).reshape(4, 4) * 16
    save_image(tmp_path / "grey.png", grey)
    save_image(tmp_path / "colour.png", np.stack([grey] * 3, -1))
    pixels = pixels_of(make([tmp_path / "grey.png", tmp_path / "colour.png"], channels=1))
    assert pixels.shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(pixels[0, 0], grey)
    np.testing.assert_array_equal(pixels[1, 0], grey)


def test_images_of_16_bits(tmp_path, caplog):
    small = np.arange(16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(small).save(tmp_path / "small.png")
    Image.fromarray(small * 4000).save(tmp_path / "large.png")
    with caplog.at_level(logging.WARNING):
        pixels = pixels_of(make([tmp_path / "small.png"]))
    assert not caplog.messages
    np.testing.assert_array_equal(pixels[0, 0], small)
    with caplog.at_level(logging.WARNING):
        pixels = pixels_of(make([tmp_path / "small.png", tmp_path / "large.png"]))
    assert len(caplog.messages) == 1
    assert "large.png): values from 0 to 60000 are cut to those of 8 bits" in caplog.text
    # The values that `transformers` gives a model.
    with Image.open(tmp_path / "large.png") as image:
        np.testing.assert_array_equal(pixels[1].transpose(1, 2, 0), np.array(image.convert("RGB")))


def test_images_are_turned_as_their_camera_says(tmp_path):
    pixels = np.arange(48).reshape(4, 4, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = pixels_of(make([tmp_path / "turned.png"]))[0]
    np.testing.assert_array_equal(turned.transpose(1, 2, 0), pixels[::-1, ::-1])


def test_contents_of_files():
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(stream, "PNG")
    content = stream.getvalue()
    pixels = pixels_of(make([content, {"bytes": content, "path": "no/such/file.png"}]))
    assert (pixels == 7).all()
    with pytest.raises(InputError, match="image 0: its table holds no image, only a path"):
        make([{"bytes": None, "path": "/etc/hostname"}])


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content).to_bytes(4)
    return len(content).to_bytes(4) + kind + content + check


BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", (10_000).to_bytes(4) + (10_000).to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    + chunk(b"IDAT", zlib.compress(bytes(1000)))
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image 0 .*is no image of a kind that is known"),
        (b"no image", "is no image of a kind that is known"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "is no image of a kind"),
        (BOMB, "image 0 .*100000000 pixels"),
    ],
)
def test_what_is_no_image(tmp_path, content, message, recwarn):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        make([tmp_path / "image.png"])
    assert "image.png" in str(caught.value) and "\n" not in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_truncated_images(tmp_path, suffix):
    file: Path = tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"image 0 \(.*cannot be read"):
        make([file]).take(np.array([0]), 0)


def test_other_sizes_than_the_model_takes(tmp_path):
    save_image(tmp_path / "wide.png", np.zeros((4, 6, 3)))
    examples = make([tmp_path / "wide.png"], do_resize=False)
    with pytest.raises(InputError, match=r"wide.png\): .* \(3, 4, 6\) of it, the model takes"):
        examples.take(np.array([0]), 0)


@pytest.mark.parametrize("shape", [(1, 201, 3), (201, 1, 3), (1, 200, 3)])
def test_lines_are_refused(tmp_path, shape):
    save_image(tmp_path / "line.png", np.zeros(shape))
    images = ImageFiles([tmp_path / "line.png"], "data")
    if max(shape) == 200:
        images.decode(0)
        return
    with pytest.raises(InputError, match="one side more than 200 times as long as the other"):
        images.decode(0)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="is no file"):
        ImageFiles([tmp_path / "pipe.png"], "data").open(0)
