"""Texts packed in rows: every token once, in few rows of few shapes."""

from itertools import islice

import numpy as np
import pytest

from adamerge_jax.data import packing
from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.batches import Calibration, calibrate
from adamerge_jax.data.packing import Packing, token_counts
from adamerge_jax.models.token_rows import PLACES, SLOTS


def texts(lengths: np.ndarray, width: int, first: int = 1) -> dict[str, np.ndarray]:
    """Texts of the given numbers of tokens, whose ids all differ."""
    mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
    ids = first + np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_tokens_are_counted_in_parts(monkeypatch):
    lengths = np.array([3, 12, 1, 5, 4, 7, 2])
    examples = ArrayExamples(texts(lengths, 12))
    monkeypatch.setattr(packing, "_COUNTED_AT_ONCE", 3)
    np.testing.assert_array_equal(token_counts(examples), lengths)
    empty = ArrayExamples(texts(np.append(lengths, 0), 12))  # in the last part alone
    assert token_counts(empty) is None


def calibration(longest: dict[str, int], batch_size: int = 6) -> Calibration:
    """Examples of tasks whose texts have from 2 tokens to so many."""
    generator = np.random.default_rng(0)
    examples = {}
    for position, (task, most) in enumerate(longest.items()):
        lengths = generator.integers(2, most + 1, 40)
        lengths[0] = most
        examples[task] = ArrayExamples(texts(lengths, 32, 1 + 10_000 * position))
    return calibrate(examples, batch_size=batch_size, held_out=0.25, seed=0)


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_every_token_lies_in_one_slot(rows):
    lengths = np.array([3, 16, 1, 7, 9, 8, 2, 16])
    batch = texts(lengths, 16)
    packed = Packing(16, rows).pack(batch)
    slots, places = packed[SLOTS], packed[PLACES]
    # 62 tokens fill four rows and, as two texts take one each, no text is parted.
    assert slots.shape == ({1: 4, 2: 4, 5: 5, 9: 9}[rows], 16)
    filled = slots[slots >= 0]
    assert sorted(filled) == sorted(np.flatnonzero(batch["attention_mask"]))
    for text, length in enumerate(lengths):
        of_text = places[text, :length]
        np.testing.assert_array_equal(np.diff(of_text), 1)  # one behind another
        assert len(set(of_text // 16)) == 1  # in one row
        found = batch["input_ids"].ravel()[slots.ravel()[of_text]]
        np.testing.assert_array_equal(found, batch["input_ids"][text, :length])


def test_rows_grow_by_quarters():
    packing = Packing(8, 8)
    shapes = {
        packing.pack(texts(np.full(count, 8), 8))[SLOTS].shape[0] for count in (3, 8, 9, 10, 11, 13)
    }
    assert shapes == {8, 10, 12, 14}


def test_batches_of_packed_texts():
    split = calibration({"short": 6, "long": 32})
    packed = split.packed()
    assert packed.packing is not None and packed.packing.length == 32
    padded_tokens = [batch.inputs["attention_mask"].size for batch in islice(split.batches(), 16)]
    packed_tokens = [batch.inputs[SLOTS].size for batch in islice(packed.batches(), 16)]
    assert sum(packed_tokens) < 0.9 * sum(padded_tokens)
    assert len(set(packed_tokens)) == 1
    first, _ = islice(packed.batches(), 2)
    for task, part in zip(split.examples, np.split(first.inputs["input_ids"], 2), strict=True):
        ids = split.examples[task].take(split.learning[task], 32)["input_ids"]
        assert {tuple(row) for row in part} <= {tuple(row) for row in ids}


def test_held_out_texts_count_once_where_they_are_packed():
    split = calibration({"short": 6, "long": 32}, batch_size=4).packed()
    ids: list[np.ndarray] = []
    for batch in split.held_out_batches():
        counted = batch.weights.ravel() > 0
        ids += list(batch.inputs["input_ids"][counted])
        assert SLOTS in batch.inputs
    expected = [
        split.examples[task].take(index, 32)["input_ids"] for task, index in split.held_out.items()
    ]
    assert sorted(map(tuple, ids)) == sorted(map(tuple, np.concatenate(expected)))


@pytest.mark.parametrize("case", ["one length", "images", "left", "between"])
def test_what_is_not_packed(case):
    if case == "one length":
        examples = {task: ArrayExamples(texts(np.full(30, 16), 16)) for task in "ab"}
    elif case == "images":
        examples = {task: ArrayExamples({"pixel_values": np.zeros((30, 3, 4, 4))}) for task in "ab"}
    else:
        arrays = texts(np.array([2] * 29 + [16]), 16)
        order = np.arange(16)[::-1].copy()
        order[0] = order[0] if case == "left" else 0  # the first token is before padding, too
        arrays["attention_mask"] = arrays["attention_mask"][:, order]
        examples = {task: ArrayExamples(arrays) for task in "ab"}
    split = calibrate(examples, batch_size=4, held_out=0.2, seed=0)
    assert split.packed().packing is None
