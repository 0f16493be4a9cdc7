"""Words and their classes from tables, against the tokens of the tokenizer itself."""

import json

import datasets
import numpy as np
import pytest

from adamerge_jax.data.class_names import align_labels
from adamerge_jax.data.copies import WithCopies
from adamerge_jax.data.examples import Subset
from adamerge_jax.data.sources import load_examples
from adamerge_jax.errors import InputError
from adamerge_jax.models.problem import WORDS
from adamerge_jax.recipes.schema import DataSource
from tests.references import bert_tokenizer, write_json_lines

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TEXTS = [["a", "bc", "d"], ["ef", "g"], list("hijklmnopq")]
TAGS = [[0, 1, 2], [2, -100], [0] * 10]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return bert_tokenizer(tmp_path_factory.mktemp("words"))


def load(root, tokenizer, max_length=10, **fields):
    return load_examples(
        DataSource(**fields),
        root=root,
        inputs=INPUTS,
        preprocessor=tokenizer,
        max_length=max_length,
        seed=0,
        name="data",
        problem=WORDS,
    )


def rows(tags=TAGS):
    return [
        {"tokens": words, "tags": of_words} for words, of_words in zip(TEXTS, tags, strict=True)
    ]


def test_a_word_is_read_at_its_first_token(tmp_path, tokenizer):
    file = write_json_lines(tmp_path / "data.jsonl", rows())
    examples = load(tmp_path, tokenizer, path=file.name, label="tags")
    index = np.array([1, 0, 2])
    labels = examples.take_labels(index, 10)
    for row, example in zip(labels, index, strict=True):
        encoded = tokenizer(
            TEXTS[example], is_split_into_words=True, truncation=True, max_length=10
        )
        expected = np.full(10, -100)
        seen = set()
        for position, word in enumerate(encoded.word_ids()):
            if word is not None and word not in seen:
                seen.add(word)
                expected[position] = TAGS[example][word]
        np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(examples.take_counted(index, 10), labels != -100)
    assert examples.cut.examples.tolist() == [False, False, True]
    part = Subset(examples, np.array([2, 1]))
    np.testing.assert_array_equal(part.take_labels(np.array([1]), 10), labels[:1])
    copies = WithCopies(part, 2, seed=0)
    np.testing.assert_array_equal(copies.take_labels(np.array([3]), 10), labels[:1])
    np.testing.assert_array_equal(copies.take_counted(np.array([5]), 10), labels[:1] != -100)


def test_a_long_text_makes_no_wide_array(tmp_path, tokenizer):
    rows = [{"tokens": ["a"] * 10_000, "tags": [1] * 10_000}, {"tokens": ["b"], "tags": [2]}]
    file = write_json_lines(tmp_path / "data.jsonl", rows)
    examples = load(tmp_path, tokenizer, path=file.name, label="tags")
    assert examples.labels.shape == (2, 10)
    assert examples.cut.examples.tolist() == [True, False]
    assert examples.take_counted(np.array([0, 1]), 10).sum(1).tolist() == [8, 1]


def test_without_labels_all_words_count(tmp_path, tokenizer):
    file = write_json_lines(tmp_path / "data.jsonl", rows())
    # As a recipe that was written out names all its fields.
    examples = load(tmp_path, tokenizer, path=file.name, text="text")
    assert examples.take_labels(np.array([0]), 10) is None
    first = load(tmp_path, tokenizer, path=file.name, label="tags")
    np.testing.assert_array_equal(
        examples.take_counted(np.array([0]), 10), first.take_counted(np.array([0]), 10)
    )
    assert examples.take_counted(np.array([1]), 10).sum() == 2


def test_classes_by_name_and_of_data_sets_of_the_hub(tmp_path, tokenizer):
    names = ["x", "y", "z"]
    named = [[names[tag] for tag in tags] for tags in ([0, 1, 2], [2, 0], [0] * 10)]
    write_json_lines(tmp_path / "named.jsonl", rows(named))
    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")),
        tags=datasets.Sequence(datasets.ClassLabel(names=names)),
    )
    table = {"tokens": TEXTS, "tags": [[0, 1, 2], [2, 0], [0] * 10]}
    stored = datasets.Dataset.from_dict(table, features=features)
    stored.to_parquet(str(tmp_path / "hub.parquet"))
    for file in ("named.jsonl", "hub.parquet"):
        examples = load(tmp_path, tokenizer, path=file, label="tags", text="tokens")
        assert examples.class_names == names
        align_labels(examples, ["z", "y", "x"], "data", outputs_of="the expert")
        assert examples.labels[:2, :3].tolist() == [[2, 1, 0], [0, 2, -100]]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda row: row.update(tokens="a b"),
            "row 1: column 'tokens' holds 'a b', expected a list",
        ),
        (lambda row: row.update(tokens=[]), "row 1: column 'tokens' has no word"),
        (lambda row: row.update(tags=[1]), "row 1: column 'tags' holds 1 of them, .* the 2 words"),
        (lambda row: row.update(tags=3), "row 1: column 'tags' holds 3, expected a class"),
        (lambda row: row.update(tags=["x", 1]), "must hold class indices.*row 1 holds"),
        (lambda row: row.update(tags=[1, -1]), "row 1 holds -1"),
        (lambda row: row.update(tags=[1, True]), "row 1 holds True"),
    ],
)
def test_rows_that_are_no_words_with_classes(change, message, tmp_path, tokenizer):
    given = rows()
    change(given[1])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, given)))
    with pytest.raises(InputError, match=message):
        load(tmp_path, tokenizer, path="data.jsonl", label="tags")
