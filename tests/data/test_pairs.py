"""Pairs of texts for sentence embedders."""

import numpy as np
import pytest
from transformers import BertTokenizer

from adamerge_jax.data.copies import WithCopies
from adamerge_jax.data.pairs import TextPairs, pair_scores
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.errors import InputError

FIRST = ["a", "a b", "c a b", "a"]
SECOND = ["b", "a", "c", "b c a c b"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TextPairs:
    vocabulary = tmp_path_factory.mktemp("pairs") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"]))
    tokenizer = BertTokenizer(str(vocabulary))
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
