"""Examples on which merge and expert differ, as they are kept."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.pipeline.predictions import (
    MOST_SHOWN,
    _differences,
    predictions_on_test,
    small_png,
)
from adamerge_jax.runs.predictions import read_predictions, write_predictions
from adamerge_jax.runs.rows import ExampleScores, Row


def test_examples_that_the_merge_lost_come_first():
    labels = np.arange(20) % 4
    merge, expert = labels.copy(), labels.copy()
    merge[10:] = (labels[10:] + 1) % 4  # the expert alone is right on ten
    expert[:3] = (labels[:3] + 1) % 4  # the merge alone on three
    expert[12] = (labels[12] + 2) % 4  # and neither of them on one of the ten
    examples = ArrayExamples({"x": np.zeros((20, 1))}, labels)
    found = _differences(examples, merge, expert, lambda data, index: (str(index), None))
    numbers = [found[name] for name in ("differing", "expert_alone_right", "merge_alone_right")]
    assert numbers == [13, 9, 3]
    assert [one.index for one in found["differences"]] == [10, 11, 13, 14, 15, 16][:MOST_SHOWN]
    assert found["differences"][0].text == "10"


@pytest.mark.parametrize(("shape", "size"), [((1, 4, 8), (72, 36)), ((3, 224, 112), (36, 72))])
def test_an_image_is_small_and_reaches_from_black_to_white(shape, size):
    pixels = np.random.default_rng(0).normal(size=shape)
    with Image.open(io.BytesIO(base64.b64decode(small_png(pixels)))) as image:
        assert image.size == size and image.format == "PNG"
    ramp = np.linspace(-2, 2, 72 * 72).reshape(1, 72, 72)
    with Image.open(io.BytesIO(base64.b64decode(small_png(ramp)))) as image:
        assert image.getextrema() == (0, 255)


def test_what_is_no_image_is_not_shown():
    assert small_png(np.zeros((4, 8, 8))) is None
    assert small_png(np.full((1, 8, 8), np.nan)) is None
    assert small_png(np.zeros((1, 8, 8))) is not None


@pytest.mark.parametrize(("of_merge", "of_expert"), [(4, 0), (0, 4)])
def test_classes_that_the_data_have_no_name_for_are_called_by_their_numbers(
    tmp_path, of_merge, of_expert
):
    def row(name, given, kind):
        scores = ExampleScores(np.zeros(2, np.float32), np.ones(2, np.int32), np.array([0, given]))
        return Row.of_examples(name, {"pets": scores}, "accuracy", kind)

    examples = ArrayExamples({"x": np.zeros((2, 1))}, np.array([0, 1]))
    rows = [row("experts", of_expert, "experts"), row("merge", of_merge, "learned")]
    predictions = predictions_on_test(
        {"pets": examples}, rows, lambda task: ["cat", "dog"], lambda: lambda *one: (None, None)
    )
    assert predictions["pets"].class_names == ["cat", "dog", "2", "3", "4"]
    write_predictions(predictions, tmp_path / "predictions.json")
    assert read_predictions(tmp_path / "predictions.json") == predictions
