"""Changed copies of examples."""

import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.copies import MOST_HIDDEN, WithCopies, with_copies

IMAGES, COPIES = 3, 2


def examples(seed: int = 0, size: int = 16) -> tuple[np.ndarray, WithCopies]:
    pixels = np.random.default_rng(0).normal(size=(IMAGES, 3, size, size)).astype(np.float32)
    pixels[2] = 0.7
    images = ArrayExamples({"pixel_values": pixels}, labels=np.arange(IMAGES))
    return pixels, WithCopies(images, COPIES, seed)


def test_images_stay_and_copies_follow():
    pixels, copied = examples()
    assert len(copied) == IMAGES * (1 + COPIES) == len(copied.padded_lengths())
    assert copied.labels.tolist() == [0, 1, 2] * 3
    index = np.arange(len(copied))
    taken = copied.take(index, 0)["pixel_values"]
    np.testing.assert_array_equal(taken[:IMAGES], pixels)
    for copy in (1, 2):
        part = taken[copy * IMAGES : (copy + 1) * IMAGES]
        assert not np.allclose(part[:2], pixels[:2])
        np.testing.assert_allclose(part[2], 0.7, atol=1e-6)  # nothing comes in from outside


@pytest.mark.parametrize("size", [16, 112])  # the copies of large images are made in threads
def test_a_copy_is_the_same_whenever_it_is_taken(size):
    _, copied = examples(size=size)
    together = copied.take(np.array([7, 3]), 0)["pixel_values"]
    np.testing.assert_array_equal(copied.take(np.array([3]), 0)["pixel_values"][0], together[1])
    _, other = examples(1, size)
    assert not np.allclose(other.take(np.array([3]), 0)["pixel_values"][0], together[1])


def test_a_copy_is_little_changed():
    smooth = np.outer(np.linspace(0, 1, 32), np.linspace(0, 1, 32)).astype(np.float32)
    images = ArrayExamples({"pixel_values": np.stack([smooth] * 3)[None]})
    copies = WithCopies(images, 20, 0).take(np.arange(1, 21), 0)["pixel_values"]
    differences = np.abs(copies[:, 0] - smooth).mean((1, 2))
    assert differences.max() < 0.15
    assert differences.min() > 0


def test_the_indices_of_copies():
    assert with_copies(np.array([0, 2]), IMAGES, COPIES).tolist() == [0, 2, 3, 5, 6, 8]


@pytest.mark.parametrize(("most", "copies"), [(1000, COPIES), (8, 1), (5, 0), (2, 0)])
def test_fewer_copies(most, copies):
    _, copied = examples()
    fewer = copied.with_fewer(most)
    assert len(fewer) == IMAGES * (1 + copies)
    last = np.array([len(fewer) - 1])
    taken = [some.take(last, 0)["pixel_values"] for some in (fewer, copied)]
    np.testing.assert_array_equal(*taken)


def test_a_copy_of_a_text_hides_some_of_its_tokens():
    length, texts = 200, 2
    mask = np.ones((texts, length), np.int32)
    mask[1, 150:] = 0
    ids = np.arange(texts * length).reshape(texts, length)
    copies = 40
    plain = ArrayExamples({"input_ids": ids, "attention_mask": mask})
    copied = WithCopies(plain, copies, 0)
    index = np.arange(len(copied))
    taken = copied.take(index, copied.padded_length(index))
    np.testing.assert_array_equal(taken["input_ids"], np.tile(ids, (1 + copies, 1)))
    shown = taken["attention_mask"].reshape(1 + copies, texts, length)
    np.testing.assert_array_equal(shown[0], mask)
    assert (shown <= mask).all()
    assert shown[:, 0, [0, -1]].all()
    assert shown[:, 1, [0, 149]].all()
    hidden = 1 - shown[1:].sum(2) / mask.sum(1)
    assert hidden.max() < MOST_HIDDEN + 0.15
    np.testing.assert_allclose(hidden.mean(), MOST_HIDDEN / 2, atol=0.03)


def test_a_text_without_a_mask_gets_one():
    copied = WithCopies(ArrayExamples({"input_ids": np.ones((1, 50), int)}), 1, 0)
    shown = copied.take(np.arange(2), 50)["attention_mask"]
    assert shown[0].all()
    assert not shown[1].all()
