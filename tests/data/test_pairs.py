"""Pairs of texts for sentence embedders."""

import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.data.batches import calibrate
from adamerge_jax.data.copies import WithCopies
from adamerge_jax.data.examples import Subset
from adamerge_jax.data.expert_targets import StoredTargets
from adamerge_jax.data.pairs import TextPairs, pair_scores
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import Targets, TaskOutputs, contrastive
from tests.references import bert_tokenizer

FIRST = ["a", "a b", "c a b", "a"]
SECOND = ["b", "a", "c", "b c a c b"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TextPairs:
    tokenizer = bert_tokenizer(tmp_path_factory.mktemp("pairs"))
    return TextPairs(*(TextExamples(texts, tokenizer, 6, "pairs") for texts in (FIRST, SECOND)))


def test_each_text_is_by_itself(pairs: TextPairs) -> None:
    index = np.array([2, 0])
    assert pairs.padded_length(index) == 6
    inputs = pairs.take(index, 6)
    assert inputs["input_ids"].tolist() == [
        [[2, 7, 5, 6, 3, 0], [2, 7, 3, 0, 0, 0]],
        [[2, 5, 3, 0, 0, 0], [2, 6, 3, 0, 0, 0]],
    ]
    assert (inputs["attention_mask"] == (inputs["input_ids"] > 0)).all()
    assert not inputs["token_type_ids"].any()
    assert pairs.cut is not None and pairs.cut.examples.tolist() == [False, False, False, True]


def test_distinct_texts_are_those_of_the_pairs(pairs: TextPairs) -> None:
    texts, index = pairs.distinct()
    assert len(texts) == 6  # a, ab, cab, b, c, bcac
    whole = pairs.take(np.arange(4), 6)["input_ids"]
    np.testing.assert_array_equal(texts.take(np.arange(6), 6)["input_ids"][index], whole)


def test_repeated_pairs_of_a_held_out_batch_change_no_value(pairs: TextPairs) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(pairs), 2, 8)).astype(np.float32)

    def value(index: np.ndarray, targets: Targets) -> np.ndarray:
        outputs = TaskOutputs(jnp.zeros((len(index), 1)), embeddings=jnp.asarray(vectors[index]))
        return np.asarray(contrastive().value(outputs, targets))

    split = calibrate({"pairs": pairs}, batch_size=2, held_out=0.25, seed=0)
    (batch,) = split.held_out_batches()
    index = np.repeat(split.held_out["pairs"], 2)
    np.testing.assert_array_equal(value(index, batch.targets[0]), 0)  # nothing to be taken for it
    index, targets = np.array([2, 0, 3]), StoredTargets(pairs)
    filled = np.resize(index, 16)
    whole = value(filled, targets.take(filled, 6))
    np.testing.assert_allclose(whole[:3], value(index, targets.take(index, 6)), rtol=1e-5)


def test_pairs_with_the_same_second_text_have_one_number(pairs: TextPairs) -> None:
    second, first = pairs._sides
    turned = TextPairs(first, second)  # the second texts of the first and the last pair are alike
    assert turned.partners is not None and pairs.partners is not None
    assert len(set(pairs.partners)) == 4 and len(set(turned.partners)) == 3
    assert turned.partners[0] == turned.partners[3]
    np.testing.assert_array_equal(
        Subset(turned, np.array([3, 1])).partners, turned.partners[[3, 1]]
    )
    np.testing.assert_array_equal(
        StoredTargets(WithCopies(turned, 1, seed=0)).take(np.array([7, 1]), 6).partners,
        turned.partners[[3, 1]],
    )


def test_copies_hide_tokens_of_both_texts(pairs: TextPairs) -> None:
    copies = WithCopies(pairs, 40, seed=0)
    assert copies.texts == 2
    index = np.arange(4, len(copies))
    masks = copies.take(index, 6)["attention_mask"]
    plain = pairs.take(index % 4, 6)["attention_mask"]
    hidden = (masks < plain).sum((0, 2))
    assert (masks <= plain).all() and (hidden > 0).all()
    assert masks[..., 0].all()  # never the first token


def test_scores_are_numbers() -> None:
    assert pair_scores([1, "0.5", np.float32(2)], [0, 1, 2], "score", "data").tolist() == [
        1,
        0.5,
        2,
    ]
    for value in (None, "near", float("nan"), True, [1], 10**400):
        with pytest.raises(InputError, match="data, row 7: 'score' is"):
            pair_scores([1, value], [3, 7], "score", "data")
