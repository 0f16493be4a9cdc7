"""The prompts and responses that a model's own answers are compared with, by format of the data."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from adamerge_jax.data.answers import Answers
from adamerge_jax.data.examples import Examples, Subset
from adamerge_jax.objectives import NOT_PREDICTED
from tests.data.test_language import load
from tests.language_references import byte_tokenizer

PAIRS = [
    {"prompt": "the red", "response": " cat runs ."},
    {"prompt": "the", "response": ""},
    {"prompt": "who sleeps ?", "response": "\nthe black dog"},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "who ?"},
            {"role": "assistant", "content": "the cow"},
            {"role": "user", "content": "what ?"},
            {"role": "assistant", "content": "sings"},
        ]
    },
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "bees"}]},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def texts(answers: Answers) -> list[tuple[str, str]]:
    decode = answers.tokenizer.decode
    return [(decode(p), decode(r)) for p, r in zip(answers.prompts, answers.responses, strict=True)]


@pytest.mark.parametrize("end", ["append", "leave"])
def test_prompts_and_responses(tokenizer, end):
    answers = load(PAIRS, tokenizer, end_of_text=end).answers
    assert texts(answers) == [("the red", " cat runs ."), ("who sleeps ?", "\nthe black dog")]
    # Without a response there is nothing to predict but, where it counts, the end.
    assert answers.examples.tolist() == ([0, 2] if end == "append" else [0, 1])
    assert answers.stops == ((tokenizer.eos_token_id,) if end == "append" else ())


@pytest.mark.parametrize("end", ["append", "leave"])
def test_conversations(tokenizer, end):
    """The last response counts; it ends where the template ends it, predicted or not."""
    answers = load(CHATS, tokenizer, end_of_text=end).answers
    first, second = texts(answers)
    assert first[0].endswith("the cow<|end|><|start|>user\nwhat ?<|end|><|start|>assistant\n")
    assert (first[1], second[1]) == ("sings", "bees")
    assert answers.stops == (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ([{"text": "the red cat"}], {}),
        (PAIRS, {"packed": True, "end_of_text": "append"}),
        (PAIRS, {"predict": "all"}),
        (CHATS, {"predict": "all"}),
    ],
)
def test_nothing_to_answer(tokenizer, rows, fields):
    assert load(rows, tokenizer, **fields).answers is None


def test_cut_responses_are_left_out(tokenizer):
    length = len(tokenizer("the red cat runs .")["input_ids"])
    whole = load(PAIRS, tokenizer, max_length=length, end_of_text="append").answers
    assert 0 in whole.examples
    cut = load(PAIRS, tokenizer, max_length=length - 1, end_of_text="append").answers
    assert cut is None or 0 not in cut.examples


def test_parts_of_examples(tokenizer):
    examples = load(PAIRS, tokenizer, end_of_text="append")
    part = Subset(examples, np.array([2, 1]))
    assert part.answers.examples.tolist() == [0]
    assert texts(part.answers) == [("who sleeps ?", "\nthe black dog")]
    assert not Subset(examples, np.array([1])).answers


def test_the_same_text_in_other_tokens(tokenizer):
    answers = load(PAIRS, tokenizer, end_of_text="append").answers
    response = answers.responses[0]
    letters = [token for letter in "cat runs ." for token in tokenizer.encode(letter)]
    assert letters != response
    given = [response, letters, letters + tokenizer.encode("\n"), response[:-1], [*response, 7], []]
    assert [answers.are_given(0, tokens) for tokens in given] == [True] * 3 + [False] * 3


def test_without_an_end_as_many_tokens_count(tokenizer):
    answers = load(PAIRS, tokenizer, end_of_text="leave").answers
    response = answers.responses[0]
    assert answers.are_given(0, response + response)
    assert not answers.are_given(0, [*response[:-1], 7, *response])


def without_ends(examples: Examples) -> list[list[int]]:
    """The labels of each example that are no end."""
    index = np.arange(len(examples))
    length = examples.padded_length(index)
    labels, is_end = examples.take_labels(index, length), examples.take_ends(index, length)
    assert (labels[is_end] != NOT_PREDICTED).all()
    kept = (labels != NOT_PREDICTED) & ~is_end
    return [row[chosen].tolist() for row, chosen in zip(labels, kept, strict=True)]


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (PAIRS, {}),
        (PAIRS, {"decoder_start": 0}),
        (CHATS, {}),
        ([{"text": "the red cat"}, {"text": "bees"}], {}),
        ([{"text": "the red cat"}, {"text": "bees"}], {"packed": True}),
    ],
)
def test_ends_apart_from_the_rest(tokenizer, rows, fields: dict[str, Any]):
    """What is predicted and no end is what is predicted where ends are left."""
    appended = load(rows, tokenizer, end_of_text="append", **fields)
    left = load(rows, tokenizer, end_of_text="leave", **fields)
    index = np.arange(len(left))
    labels = left.take_labels(index, left.padded_length(index))
    expected = [row[row != NOT_PREDICTED].tolist() for row in labels]
    actual = [row for row in without_ends(appended) if row]
    if fields.get("packed"):
        expected, actual = ([[t for row in rows for t in row]] for rows in (expected, actual))
    assert actual == expected
    assert not left.take_ends(index, 16).any()
    assert appended.take_ends(np.arange(len(appended)), 96).any()


@pytest.mark.parametrize("end", ["append", "leave"])
def test_responses_of_encoder_decoders(tokenizer, end):
    answers = load(PAIRS, tokenizer, end_of_text=end, decoder_start=0).answers
    assert texts(answers)[:2] == [("the red", " cat runs ."), ("who sleeps ?", "\nthe black dog")]
    assert answers.stops == ((tokenizer.eos_token_id,) if end == "append" else ())
    assert answers.beside is None
    length = len(answers.responses[1]) + (end == "append")
    cut = load(PAIRS, tokenizer, end_of_text=end, decoder_start=0, max_length=length - 1).answers
    assert ("who sleeps ?", "\nthe black dog") not in texts(cut)
