import numpy as np

from adamerge_jax.data.augmentations import SMALLEST_CROP, augment


def texts(rows: int = 200, length: int = 64) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, length + 1, rows)
    lengths[:3] = [1, 2, length]
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {"input_ids": generator.integers(5, 99, (rows, length)), "attention_mask": mask}


def test_an_augmented_text_hides_one_token_in_five():
    inputs = texts()
    view = augment(inputs, np.random.default_rng(1))
    assert view.keys() == inputs.keys()
    assert view["input_ids"] is inputs["input_ids"]
    mask, shown = inputs["attention_mask"], view["attention_mask"]
    assert shown.dtype == mask.dtype and shown.shape == mask.shape
    # Only what could be seen is hidden: padding stays padding.
    assert (shown <= mask).all()
    rows = np.arange(len(mask))
    last = mask.sum(1) - 1
    assert (shown[:, 0] == 1).all()
    assert (shown[rows, last] == 1).all()
    between = np.maximum(mask.sum(1) - 2, 0).sum()
    assert abs((mask - shown).sum() / between - 0.2) < 0.02


def test_without_a_mask_any_token_of_a_text_may_be_hidden():
    ids = texts()["input_ids"]
    view = augment({"input_ids": ids}, np.random.default_rng(1))
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = augment(whole, np.random.default_rng(1))
    assert view.keys() == expected.keys()
    np.testing.assert_array_equal(view["attention_mask"], expected["attention_mask"])
    assert 0.7 < view["attention_mask"].mean() < 0.9


def test_an_augmented_text_is_that_of_the_generator():
    first, again = (augment(texts(), np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first["attention_mask"], again["attention_mask"])
    generator = np.random.default_rng(1)
    augment(texts(), generator)
    other = augment(texts(), generator)
    assert (other["attention_mask"] != first["attention_mask"]).any()


def test_augmenting_changes_no_input_in_place():
    inputs = texts()
    before = inputs["attention_mask"].copy()
    augment(inputs, np.random.default_rng(1))
    np.testing.assert_array_equal(inputs["attention_mask"], before)


def test_an_augmented_image():
    pixels = np.random.default_rng(0).normal(size=(20, 3, 16, 24)).astype(np.float32)
    view = augment({"pixel_values": pixels}, np.random.default_rng(1))["pixel_values"]
    assert view.shape == pixels.shape and view.dtype == pixels.dtype
    assert view.flags.c_contiguous
    for seen, image in zip(view, pixels, strict=True):
        assert (seen != image).any()
        for channel, own in zip(seen, image, strict=True):
            assert own.min() <= channel.min() and channel.max() <= own.max()
    again = augment({"pixel_values": pixels}, np.random.default_rng(1))["pixel_values"]
    np.testing.assert_array_equal(view, again)


def test_an_augmented_image_is_a_part_of_it_enlarged():
    # Each pixel holds its own coordinate, so that the view says where it was taken from.
    rows, columns = np.mgrid[0:33, 0:33].astype(np.float32)
    pixels = np.stack([np.stack([rows, columns])] * 50)
    view = augment({"pixel_values": pixels}, np.random.default_rng(0))["pixel_values"]
    steps_down, steps_right = np.diff(view[:, 0], axis=1), np.diff(view[:, 1], axis=2)
    scale = steps_down.mean((1, 2))
    assert (scale >= np.sqrt(SMALLEST_CROP) - 1e-5).all() and (scale <= 1).all()
    # All of one scale, in both directions.
    np.testing.assert_allclose(
        steps_down, np.broadcast_to(scale[:, None, None], (50, 32, 33)), atol=1e-4
    )
    np.testing.assert_allclose(
        np.abs(steps_right), np.broadcast_to(scale[:, None, None], (50, 33, 32)), atol=1e-4
    )
    mirrored = (steps_right < 0).all((1, 2))
    assert 10 < mirrored.sum() < 40


def test_an_augmented_image_in_half_precision():
    pixels = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float16)
    views = [
        augment({"pixel_values": array}, np.random.default_rng(1))["pixel_values"]
        for array in (pixels, pixels.astype(np.float32))
    ]
    assert views[0].dtype == np.float16
    np.testing.assert_array_equal(views[0], views[1].astype(np.float16))
