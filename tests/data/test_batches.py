from itertools import islice

import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.batches import BATCHES_SORTED_TOGETHER, Calibration, calibrate
from adamerge_jax.data.examples import sorted_batches
from adamerge_jax.data.expert_targets import CrossTaskLogits, StoredTargets
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import Targets
from tests.references import bert_tokenizer

SIZES = {"small": 11, "large": 30}


def numbered(sizes: dict[str, int] = SIZES) -> dict[str, ArrayExamples]:
    """Examples that say which they are: 0, 1, ... of the first task, 1000, ... of the next."""
    return {
        task: ArrayExamples({"pixel_values": np.arange(size) + 1000 * position})
        for position, (task, size) in enumerate(sizes.items())
    }


def calibration(seed: int = 0, batch_size: int = 4, held_out: float = 0.2) -> Calibration:
    return calibrate(numbered(), batch_size=batch_size, held_out=held_out, seed=seed)


def seen(calibration: Calibration, count: int) -> np.ndarray:
    """What the first batches hold, `[count, tasks, B]`."""
    batches = [batch.inputs["pixel_values"] for batch in islice(calibration.batches(), count)]
    return np.stack(batches).reshape(count, 2, calibration.batch_size)


def test_prompts_are_targets_of_what_is_learned_from_alone():
    class Prompts(ArrayExamples):
        def take_prompts(self, index, length):
            return self.take(index, length)["pixel_values"][:, None] % 2 == 0

    numbers = {task: data.take(np.arange(len(data)), 0) for task, data in numbered().items()}
    examples = {task: Prompts(inputs) for task, inputs in numbers.items()}
    split = calibrate(examples, batch_size=4, held_out=0.2, seed=0)._replace(prompts=["large"])
    for batch in islice(split.batches(), 3):
        small, large = batch.targets
        assert small.prompts is None
        of_large = batch.inputs["pixel_values"][4:]
        np.testing.assert_array_equal(large.prompts[:, 0], of_large % 2 == 0)
    assert all(targets.prompts is None for targets in next(split.held_out_batches()).targets)


@pytest.mark.parametrize("held_out", [0.01, 0.2, 0.5])
def test_every_example_is_on_one_side_of_the_split(held_out):
    split = calibration(held_out=held_out)
    for task, size in SIZES.items():
        assert len(split.held_out[task]) == max(1, round(held_out * size))
        both = np.concatenate([split.learning[task], split.held_out[task]])
        assert sorted(both) == list(range(size))


def test_batches_have_one_shape_and_the_weights_of_a_mean():
    for batch in islice(calibration().batches(), 12):
        assert batch.inputs["pixel_values"].shape == (8,)
        np.testing.assert_array_equal(batch.weights, np.full((2, 4), 0.25, np.float32))
        # First the examples of the first task, then those of the second.
        assert (batch.inputs["pixel_values"] >= 1000).tolist() == [False] * 4 + [True] * 4


def test_batches_hold_only_examples_to_learn_from():
    split = calibration()
    assert set(seen(split, 30).ravel()) == set(split.learning["small"]) | {
        1000 + index for index in split.learning["large"]
    }


def test_every_epoch_is_complete_and_in_another_order():
    split = calibration()
    small = seen(split, 9)[:, 0].ravel()  # 9 examples to learn from, 36 drawn: four epochs
    epochs = small.reshape(4, 9)
    for epoch in epochs:
        assert sorted(epoch) == sorted(split.learning["small"])
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides():
    np.testing.assert_array_equal(seen(calibration(3), 20), seen(calibration(3), 20))
    assert not np.array_equal(seen(calibration(3), 20), seen(calibration(4), 20))
    assert calibration(3).held_out["large"].tolist() != calibration(4).held_out["large"].tolist()
    # Looking twice starts from the beginning twice.
    split = calibration(3)
    np.testing.assert_array_equal(seen(split, 5), seen(split, 5))


@pytest.mark.parametrize(("batch_size", "held_out"), [(4, 0.2), (1, 0.2), (3, 0.5), (5, 0.5)])
def test_held_out_batches_are_the_mean_over_every_held_out_example(batch_size, held_out):
    split = calibration(batch_size=batch_size, held_out=held_out)
    batches = list(split.held_out_batches())
    numbers = np.stack([b.inputs["pixel_values"].reshape(2, batch_size) for b in batches], axis=1)
    weights = np.stack([batch.weights for batch in batches], axis=1)
    for position, task in enumerate(SIZES):
        counted = numbers[position][weights[position] > 0]
        assert sorted(counted - 1000 * position) == sorted(split.held_out[task])
        np.testing.assert_allclose(weights[position].sum(), 1, rtol=1e-6)
        mean = (numbers[position] * weights[position]).sum()
        expected = split.held_out[task].mean() + 1000 * position
        np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_targets_go_with_their_examples():
    split = calibration()
    for batch in islice(split.batches(), 2):
        assert all(target == Targets() for target in batch.targets)
        assert batch.augmented_inputs is None
    logits = {
        task: np.stack([np.arange(size) + 1000 * position] * (position + 2), axis=1)
        for position, (task, size) in enumerate(SIZES.items())
    }
    for task, own in logits.items():
        split.examples[task].labels = own[:, 0]
    asked = split._replace(
        targets={t: StoredTargets(split.examples[t], Targets(own)) for t, own in logits.items()}
    )
    for batch in [*islice(asked.batches(), 5), *asked.held_out_batches()]:
        numbers = batch.inputs["pixel_values"].reshape(2, 4)
        assert [target.expert_logits.shape for target in batch.targets] == [(4, 2), (4, 3)]
        for row, target in zip(numbers, batch.targets, strict=True):
            np.testing.assert_array_equal(target.labels, row)
            wanted = np.stack([row] * target.expert_logits.shape[1], axis=1)
            np.testing.assert_array_equal(target.expert_logits, wanted)


def test_examples_that_an_expert_was_asked_of_stand_for_all():
    split = calibration()
    first, second = SIZES
    learned_from = split.learning[second]
    asked = learned_from[::3]
    said = np.full((SIZES[second], 2), np.nan, np.float32)
    said[asked] = asked[:, None]
    cross_task = {first: CrossTaskLogits({second: said}, split.learning)}
    batches = split._replace(cross_task=cross_task).batches()
    drawn, weights = [], []
    for batch in islice(batches, len(learned_from)):
        own, others = batch.targets
        numbers = batch.inputs["pixel_values"].reshape(2, 4)[1] - 1000
        known = np.isin(numbers, asked)
        logits, example_weights = own.cross_task
        assert logits.shape == (4, 1, 2)
        np.testing.assert_array_equal(logits[:, 0, 0], np.where(known, numbers, 0))
        np.testing.assert_array_equal(example_weights[:, 0] > 0, known)
        assert others.cross_task is None
        drawn.append(numbers)
        weights.append(example_weights)
    # Every example was drawn equally often, so that the weights' mean is that of one each.
    assert len(set(np.bincount(np.concatenate(drawn).astype(int))[learned_from])) == 1
    np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-6)


def test_texts_of_like_length_share_a_batch(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    words = np.random.default_rng(0).integers(1, 29, 160)
    examples = {
        task: TextExamples([" ".join("a" * n) for n in words], tokenizer, 32, task)
        for task in ("first", "second")
    }
    split = calibrate(examples, batch_size=4, held_out=0.2, seed=0)
    batches = list(islice(split.batches(), BATCHES_SORTED_TOGETHER))
    shown = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
    computed = sum(batch.inputs["attention_mask"].size for batch in batches)
    assert shown > 0.65 * computed
    # Long and short batches alternate: the order says nothing of the length.
    lengths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert lengths != sorted(lengths)
    # Each example is drawn equally often.
    epoch = len(split.learning["first"]) // 4
    drawn = [b.inputs["attention_mask"].sum(1) for b in islice(split.batches(), epoch)]
    expected = np.sort(words[split.learning["first"]] + 2)
    np.testing.assert_array_equal(np.sort(np.concatenate([d[:4] for d in drawn])), expected)


@pytest.mark.parametrize(("size", "batch_size"), [(10, 8), (40, 8), (100, 4)])
def test_no_text_is_twice_in_a_batch(tmp_path, size, batch_size):
    step = 100 // size  # each text of another length, in several buckets
    texts = [" ".join("a" * (1 + step * n)) for n in range(size)]
    examples = TextExamples(texts, bert_tokenizer(tmp_path), 128, "task")
    split = calibrate({"task": examples}, batch_size=batch_size, held_out=0.2, seed=0)
    # As many as one epoch fills; a batch that spans two may hold a text of both.
    epoch = len(split.learning["task"]) // batch_size
    for batch in islice(split.batches(), min(BATCHES_SORTED_TOGETHER, epoch)):
        lengths = batch.inputs["attention_mask"].sum(1)
        assert len(np.unique(lengths)) == batch_size


def test_augmented_examples(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    examples = {"only": TextExamples(["a b c d e f g h"] * 20, tokenizer, 32, "only")}
    split = calibrate(examples, batch_size=8, held_out=0.2, seed=0)._replace(augmented=True)
    first, again = (next(split.batches()) for _ in range(2))
    np.testing.assert_array_equal(
        first.augmented_inputs["attention_mask"], again.augmented_inputs["attention_mask"]
    )
    assert first.augmented_inputs["attention_mask"].sum() < first.inputs["attention_mask"].sum()
    np.testing.assert_array_equal(first.augmented_inputs["input_ids"], first.inputs["input_ids"])


def test_texts_of_all_tasks_are_padded_to_one_bucket(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    examples = {
        "short": TextExamples(["a b"] * 10, tokenizer, 32, "short"),
        "mixed": TextExamples([" ".join("a" * n) for n in range(1, 31)], tokenizer, 32, "mixed"),
    }
    split = calibrate(examples, batch_size=2, held_out=0.2, seed=0)
    shapes = {batch.inputs["input_ids"].shape for batch in islice(split.batches(), 40)}
    assert shapes == {(4, 16), (4, 24), (4, 32)}
    for batch in islice(split.batches(), 5):
        assert {array.shape for array in batch.inputs.values()} == {batch.inputs["input_ids"].shape}


def token_arrays(length: int, *names: str) -> ArrayExamples:
    """Ten texts of ones, with further arrays of ones."""
    return ArrayExamples({name: np.ones((10, length), np.int32) for name in ("input_ids", *names)})


def test_what_only_some_tasks_have_is_completed():
    bare = token_arrays(6)
    halved = ArrayExamples(
        {
            "input_ids": np.ones((10, 6), np.int32),
            "attention_mask": np.tile(np.arange(6) < 3, (10, 1)).astype(np.int32),
        }
    )
    for examples in ({"bare": bare, "halved": halved}, {"halved": halved, "bare": bare}):
        split = calibrate(examples, batch_size=2, held_out=0.2, seed=0)
        for batch in [next(split.batches()), *split.held_out_batches()]:
            shown = batch.inputs["attention_mask"].reshape(2, 2, 6).sum(-1)
            wanted = [[6 if task == "bare" else 3] * 2 for task in examples]
            np.testing.assert_array_equal(shown, wanted)


def test_token_arrays_of_all_tasks_are_padded_to_the_longest():
    examples = {"short": token_arrays(4), "long": token_arrays(6, "token_type_ids")}
    split = calibrate(examples, batch_size=2, held_out=0.2, seed=0)
    batch = next(split.batches())
    mask = [[1, 1, 1, 1, 0, 0]] * 2 + [[1] * 6] * 2
    np.testing.assert_array_equal(batch.inputs["attention_mask"], mask)
    np.testing.assert_array_equal(batch.inputs["input_ids"], mask)
    types = [[0] * 6] * 2 + [[1] * 6] * 2
    np.testing.assert_array_equal(batch.inputs["token_type_ids"], types)


def test_tasks_whose_examples_cannot_share_a_batch():
    def images(side: int, name: str = "pixel_values") -> ArrayExamples:
        return ArrayExamples({name: np.zeros((10, 3, side, side), np.float32)})

    with pytest.raises(
        InputError, match=r"pixel_values has shape \(3, 8, 8\) in task 'a' and \(3, 4, 4\) in .*'b'"
    ):
        calibrate({"a": images(8), "b": images(4)}, batch_size=2, held_out=0.2, seed=0)
    with pytest.raises(InputError, match="task 'b' has no 'pixel_values', that of task 'a' has"):
        calibrate({"a": images(8), "b": images(8, "x")}, batch_size=2, held_out=0.2, seed=0)


def test_too_few_examples():
    calibrate(numbered({"a": 5}), batch_size=4, held_out=0.2, seed=0)
    with pytest.raises(InputError, match=r"task 'b': 4 example.* 1 of them .* 4 of one batch"):
        calibrate(numbered({"a": 5, "b": 4}), batch_size=4, held_out=0.2, seed=0)


def test_refuses_targets_of_some_tasks_only():
    examples = numbered()
    targets = {"small": StoredTargets(examples["small"])}
    with pytest.raises(InputError, match="targets of task 'large' are missing"):
        calibrate(examples, batch_size=4, held_out=0.2, seed=0, targets=targets)


def test_refuses_labels_that_are_not_one_for_each_example():
    with pytest.raises(InputError, match=r"differ in number \(pixel_values 3, labels 2\)"):
        ArrayExamples({"pixel_values": np.zeros((3, 1))}, labels=np.zeros(2, int))


def test_the_shortest_texts_fill_up_an_evaluation(tmp_path):
    texts = [" ".join("a" * count) for count in (100, 3, 3, 3, 40, 40, 100)]
    examples = TextExamples(texts, bert_tokenizer(tmp_path), 128, "task")
    batches = list(sorted_batches(examples, 3))
    counted = np.concatenate([index for index, _ in batches])
    assert sorted(counted) == list(range(7))
    assert [len(index) for index, _ in batches] == [1, 3, 3]
    assert [inputs["input_ids"].shape for _, inputs in batches] == [(3, 16), (3, 48), (3, 128)]
