"""Prompts without answers: the package's own, and those of a table."""

import json

import pytest

from adamerge_jax.data.prompts import GENERAL, Prompts, read_prompts
from adamerge_jax.data.tables import Table
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.recipes.schema import RetainRecipe
from tests.language_references import byte_tokenizer

ASKED = [{"messages": [{"role": "user", "content": text}]} for text in ("who ?", "the cow sings .")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def read(rows, tokenizer, *, is_chat=True, max_length=96) -> Prompts | None:
    table = Table.of_rows(rows, RetainRecipe(path="general.jsonl"), "general text")
    return read_prompts(table, tokenizer, is_chat=is_chat, max_length=max_length)


def test_the_packages_own():
    rows = [json.loads(line) for line in GENERAL.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] for row in rows]
    assert len(texts) == len(set(texts)) == 300
    assert all(text.strip() == text and "\n" not in text and len(text) < 100 for text in texts)


def test_a_prompt_is_a_users_message_to_a_chat_model(tokenizer):
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    prompts = [{"prompt": row["messages"][0]["content"]} for row in ASKED]
    for rows in prompts, ASKED:
        read_in = read(rows, tokenizer)
        assert [tokenizer.decode(ids) for ids in read_in.tokens] == [
            f"<|start|>user\n{row['prompt']}<|end|><|start|>assistant\n" for row in prompts
        ]
        assert read_in.stops == sorted([end, eos])
    plain = read(prompts, tokenizer, is_chat=False)
    assert [tokenizer.decode(ids) for ids in plain.tokens] == ["who ?", "the cow sings ."]
    assert plain.stops == [eos]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "who ?", "response": "bees"}],
        [{"text": "the cow"}],
        [*ASKED, {"messages": [*ASKED[0]["messages"], {"role": "assistant", "content": "bees"}]}],
        [{"messages": "who ?"}],  # refused where it is read as a conversation
    ],
)
def test_what_has_answers_or_is_no_prompt(rows, tokenizer):
    assert read(rows, tokenizer) is None


def test_prompts_that_leave_no_room(tokenizer):
    lengths = [len(ids) for ids in read(ASKED, tokenizer).tokens]
    assert lengths[0] != lengths[1]
    assert len(read(ASKED, tokenizer, max_length=max(lengths) + 8)) == 2
    assert len(read(ASKED, tokenizer, max_length=max(lengths) + 7)) == 1


def test_a_template_that_refuses(tokenizer):
    without = byte_tokenizer(chat_template="{{ raise_exception('no users') }}")
    with pytest.raises(InputError, match=r"general text: .*cannot write .*who.*no users"):
        read(ASKED, without)


def test_answers_are_predicted(tokenizer):
    prompts = read(ASKED, tokenizer)
    answer = tokenizer.encode("the cow<|end|>")
    examples = prompts.answered([1], [answer])
    (labels,) = examples.take_labels([0], 64)
    assert labels[labels != NOT_PREDICTED].tolist() == answer
    inputs = examples.take([0], 64)
    count = inputs["attention_mask"].sum()
    assert inputs["input_ids"][0, :count].tolist() == prompts.tokens[1] + answer


@pytest.mark.parametrize(
    ("answer", "opening"),
    [
        ("The cow sings. The dog", "The cow sings."),
        ("1. The cow", "1. The cow"),
        ("Bees!\nOr", "Bees!"),
        ('"The cow." Then', '"The cow.'),
        ("It is 3.14 and more", "It is 3.14 and m"),
        ("Yes\nno", "Yes\n"),
        ("Who", "Who"),
    ],
)
def test_the_first_sentence(answer, opening, tokenizer):
    """A token a letter; of long sentences 16 tokens."""
    letters = [token for letter in answer for token in tokenizer.encode(letter)]
    assert len(letters) == len(answer)
    assert read(ASKED, tokenizer).opening(letters, 16) == len(opening)
