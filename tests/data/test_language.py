"""What a language model reads and predicts, against plain references written here."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adamerge_jax.data import chat_templates
from adamerge_jax.data.end_of_text import PredictsEnd
from adamerge_jax.data.examples import Examples, Subset, tell_cut
from adamerge_jax.data.language import make_language_examples
from adamerge_jax.data.sources import load_examples
from adamerge_jax.data.tables import Table
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.recipes.schema import DataSource
from tests.language_references import SPECIAL, byte_tokenizer
from tests.references import write_json_lines

NAME = "calibration data of task 'x'"
PAD, BOS, EOS = (SPECIAL.index(token) for token in ("<pad>", "<s>", "</s>"))

PAIRS = [
    {"prompt": "the red", "response": " cat runs ."},
    {"prompt": "who sleeps ?", "response": "\nthe black dog sleeps , naïve \N{HATCHING CHICK}"},
    {"prompt": "the", "response": ""},
]
TEXTS = [{"text": "the red cat runs ."}, {"text": "bees"}]
TEXTS_AS_PAIRS = [{"prompt": "", "response": row["text"]} for row in TEXTS]
CHATS = [
    [
        {"role": "user", "content": "the red cat ?"},
        {"role": "assistant", "content": "the red cat runs ."},
    ],
    [
        {"role": "system", "content": "the cow sings ."},
        {"role": "user", "content": "who ?"},
        {"role": "assistant", "content": "the cow \N{COW FACE}"},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "sings"},
    ],
]

Row = tuple[list[int], list[bool]]
"""Token ids, and whether each is to be predicted."""


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """Knows what begins and ends a text, and adds neither."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def adding() -> PreTrainedTokenizerFast:
    """Adds what begins and ends a text itself."""
    return byte_tokenizer(added="<s> $A </s>")


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    """Knows no special tokens."""
    return byte_tokenizer(bos_token=None, eos_token=None, pad_token=None, unk_token=None)


def load(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 96,
    decoder_start: int | None = None,
    predicts_end: PredictsEnd = lambda examples: True,
    **fields: Any,
) -> Examples:
    source = DataSource(path="data.jsonl", **fields)
    table = Table.of_rows(rows, source, NAME)
    return make_language_examples(
        table,
        tokenizer,
        max_length=max_length,
        decoder_start=decoder_start,
        predicts_end=predicts_end,
    )


def refused(match: str, rows: list[dict[str, Any]], *arguments: Any, **fields: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(rows, *arguments, **fields)
    assert str(caught.value).startswith(NAME)
    assert "\n" not in str(caught.value)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a text and nothing else."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def require(examples: Examples, expected: Sequence[Row], padding: int) -> None:
    """Ids, mask and labels of each example alone, and of all in one batch."""
    assert len(examples) == len(expected)
    everything = np.arange(len(expected))
    longest = examples.padded_length(everything)
    batch = examples.take(everything, longest)
    assert batch.keys() == {"input_ids", "attention_mask"}
    labels = examples.take_labels(everything, longest)
    assert examples.labels is None and examples.class_names is None
    for row, (ids, counts) in enumerate(expected):
        beyond = longest - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [padding] * beyond
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * beyond
        # transformers shifts labels inside of its models, ours are shifted already.
        unshifted = [i if count else NOT_PREDICTED for i, count in zip(ids, counts, strict=True)]
        wanted = unshifted[1:] + [NOT_PREDICTED] * (beyond + 1)
        assert labels[row].tolist() == wanted
        own = np.array([row])
        length = examples.padded_length(own)
        assert length >= len(ids)
        assert examples.take_labels(own, length)[0].tolist() == wanted[:length]


@pytest.mark.parametrize(
    ("kind", "before", "after", "padding"),
    [("plain", [], [EOS], PAD), ("adding", [BOS], [EOS], PAD), ("bare", [], [], 0)],
)
class TestTokenizers:
    """Each kind of row with a tokenizer of each kind."""

    def test_texts(self, kind, before, after, padding, request):
        tokenizer = request.getfixturevalue(kind)
        ids = [before + encode(tokenizer, row["text"]) + after for row in TEXTS]
        require(load(TEXTS, tokenizer), [(own, [True] * len(own)) for own in ids], padding)

    @pytest.mark.parametrize("predict", ["response", "all"])
    def test_prompts_and_responses(self, kind, before, after, padding, predict, request):
        tokenizer = request.getfixturevalue(kind)
        expected = []
        for row in PAIRS:
            prompt = before + encode(tokenizer, row["prompt"])
            response = encode(tokenizer, row["response"]) + after
            counts = [predict == "all"] * len(prompt) + [True] * len(response)
            expected.append((prompt + response, counts))
        if kind == "bare":
            # Nothing follows the last prompt, and before its one token is nothing.
            expected.pop()
        require(load(PAIRS, tokenizer, predict=predict), expected, padding)

    def test_conversations(self, kind, before, after, padding, request):
        tokenizer = request.getfixturevalue(kind)
        expected = []
        for messages in CHATS:
            reference = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            expected.append(
                (reference["input_ids"], [m == 1 for m in reference["assistant_masks"]])
            )
            assert tokenizer.decode(reference["input_ids"]).count("<s>") == 0
        rows = [{"messages": messages} for messages in CHATS]
        examples = load(rows, tokenizer, end_of_text="append")
        require(examples, expected, padding)
        # Three answers, each with the token that ends it.
        end = SPECIAL.index("<|end|>")
        assert (examples.take_labels(np.array([0, 1]), 96) == end).sum() == 3


@pytest.mark.parametrize("kind", ["plain", "adding"])
def test_the_tokens_of_prompts_behind_what_all_of_them_begin_with(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rows = [{"prompt": f"a b {word} c", "response": "b a"} for word in ("a", "b", "c a b")]
    examples = load(rows, tokenizer)
    index = np.arange(len(rows))
    length = examples.padded_length(index)
    ids = examples.take(index, length)["input_ids"]
    labels, prompts = examples.take_labels(index, length), examples.take_prompts(index, length)
    shared = int((ids == ids[0]).all(0).argmin())
    assert shared >= len(encode(tokenizer, "a b"))
    for row, prompt in enumerate(rows):
        end = int((labels[row] != NOT_PREDICTED).argmax())  # the last token of the prompt
        assert np.flatnonzero(prompts[row]).tolist() == list(range(shared - 1, end))
        behind = ids[row][np.flatnonzero(prompts[row]) + 1].tolist()
        assert encode(tokenizer, prompt["prompt"])[-len(behind) :] == behind
    np.testing.assert_array_equal(
        Subset(examples, index[1:]).take_prompts(index[:2], length), prompts[1:]
    )
    # All of a text is predicted, and one prompt alone has nothing that the others lack.
    assert not load(TEXTS, tokenizer).take_prompts(np.arange(2), 96).any()
    assert not load(rows[:1], tokenizer).take_prompts(index[:1], length).any()


def test_all_tokens_of_conversations(plain):
    ids = [plain.apply_chat_template(messages)["input_ids"] for messages in CHATS]
    examples = load([{"messages": messages} for messages in CHATS], plain, predict="all")
    require(examples, [(own, [True] * len(own)) for own in ids], PAD)


def test_a_padding_token_takes_the_place_of_none():
    tokenizer = byte_tokenizer(pad_token=None)
    ids = [[*encode(tokenizer, row["text"]), EOS] for row in TEXTS]
    require(load(TEXTS, tokenizer), [(own, [True] * len(own)) for own in ids], EOS)


def answers(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], end: str = "append"
) -> list[str]:
    """The tokens of one conversation that are predicted."""
    examples = load([{"messages": messages}], tokenizer, end_of_text=end)
    labels = examples.take_labels(np.array([0]), 96)[0]
    return [tokenizer.decode([token]) for token in labels if token != NOT_PREDICTED]


def test_an_answer_that_shares_its_first_token_with_what_asks_for_it():
    """`transformers` counts it too."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    messages = [CHATS[0][0], {"role": "assistant", "content": "cat runs ."}]
    reference = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    counts = [mask == 1 for mask in reference["assistant_masks"]]
    examples = load([{"messages": messages}], tokenizer, end_of_text="append")
    require(examples, [(reference["input_ids"], counts)], PAD)
    assert answers(tokenizer, messages)[0] == " cat"


def test_what_asks_for_an_answer_may_say_more_than_the_answer(plain):
    tokenizer = byte_tokenizer(
        chat_template=plain.chat_template.replace(
            "<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}"
        )
    )
    assert "".join(answers(tokenizer, CHATS[0])) == "the red cat runs .<|end|>"


def test_what_a_conversation_opens_with_answers_nothing(plain):
    messages = [{"role": "assistant", "content": "hello"}, *CHATS[0]]
    assert "".join(answers(plain, messages)) == "the red cat runs .<|end|>"


@pytest.mark.parametrize(
    ("message", "last"),
    [
        ({"content": "the red cat runs .\n"}, "the red cat runs .\n"),
        ({"content": "no<|end|>"}, "no<|end|>"),  # the response itself
        ({"content": "<|end|>"}, "<|end|>"),
        ({"content": "see", "calls": "f(1)"}, "seeCALLf(1)"),
        ({"content": "see", "calls": "f(1)", "going": True}, "seeCALLf(1)<|unlike|>\n"),
    ],
)
def test_what_a_template_puts_behind_a_response(message, last):
    """Counts only if it is asked for; a call of a tool is part of the response."""
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m['calls'] %}CALL{{ m['calls'] }}{% endif %}"
        "{% if m['going'] %}<|unlike|>{% else %}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    messages = [CHATS[0][0], {"role": "assistant", **message}]
    for end in ("leave", "auto"):
        assert "".join(answers(tokenizer, messages, end)) == last
    end = "" if "going" in message else "<|end|>\n"
    assert "".join(answers(tokenizer, messages, "append")) == last + end
    # Not only of the last response.
    more = [*messages, {"role": "user", "content": "and ?"}, CHATS[0][1]]
    assert "".join(answers(tokenizer, more, "leave")) == last + CHATS[0][1]["content"]


def test_templates_that_trim_responses():
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }} </s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    messages = [CHATS[0][0], {"role": "assistant", "content": "  the cat\n\n"}]
    assert "".join(answers(tokenizer, messages, "leave")) == "the cat"
    assert "".join(answers(tokenizer, messages, "append")) == "the cat </s>"


def test_contents_in_parts():
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in CHATS[0]
    ]
    tokenizer = byte_tokenizer(chat_template=template)
    assert "".join(answers(tokenizer, messages, "leave")) == CHATS[0][1]["content"]


def test_all_tokens_and_no_end_of_conversations(plain):
    rows = [{"messages": CHATS[0]}]
    refused("predict: all, all that the chat", rows, plain, predict="all", end_of_text="leave")


def require_asked(examples: Examples, expected: list[list[int]]) -> None:
    """These sequences, the last token of each the end of text."""
    index = np.arange(len(examples))
    batch = examples.take(index, 96)
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    labels = examples.take_labels(index, 96)
    for row, ids in enumerate(expected):
        assert [label for label in labels[row] if label != NOT_PREDICTED] == ids
        assert labels[row][mask[row].sum() - (1 if "decoder_input_ids" not in batch else 0) - 1]
    assert all(row[row != NOT_PREDICTED][-1] == EOS for row in labels)


@pytest.mark.parametrize("kind", ["plain", "adding"])
@pytest.mark.parametrize("decoder_start", [None, 7])
@pytest.mark.parametrize("predicts", [True, False])
def test_the_expert_is_asked(kind, decoder_start, predicts, request):
    tokenizer = request.getfixturevalue(kind)
    # One is too long to have its end, and one ends by itself.
    rows = [{"prompt": "the", "response": " red cat" * 30}, *PAIRS[:2], *PAIRS[:2]]
    rows.append({"prompt": "the", "response": "cow</s>"})
    asked: list[Examples] = []

    def answer(examples: Examples) -> bool:
        asked.append(examples)
        return predicts

    options = {"decoder_start": decoder_start, "max_length": 60}
    examples = load(rows, tokenizer, predicts_end=answer, **options)
    begin = [BOS] if kind == "adding" and decoder_start is not None else []
    responses = [[*begin, *encode(tokenizer, row["response"])] for row in PAIRS[:2]]
    assert len(asked) == 1
    require_asked(asked[0], [[*ids, EOS] for ids in responses * 2])
    # As if the recipe had said so.
    named = load(rows, tokenizer, end_of_text="append" if predicts else "leave", **options)
    assert examples.end_of_text == named.end_of_text == ("append" if predicts else "leave")
    index = np.arange(len(rows))
    for name, array in named.take(index, 60).items():
        np.testing.assert_array_equal(examples.take(index, 60)[name], array, err_msg=name)
    labels = named.take_labels(index, 60)
    np.testing.assert_array_equal(examples.take_labels(index, 60), labels)
    ends = [EOS] if predicts else []
    for row, ids in zip(labels[1:5], responses * 2, strict=True):
        assert row[row != NOT_PREDICTED].tolist() == ids + ends
    # The end that is written in the text itself stays.
    assert labels[5][labels[5] != NOT_PREDICTED].tolist()[-1] == EOS
    assert (labels[5] == EOS).sum() == 1


@pytest.mark.parametrize("kind", ["plain", "adding"])
def test_texts_without_an_end(kind, request):
    tokenizer = request.getfixturevalue(kind)
    begin = [BOS] if kind == "adding" else []
    ids = [begin + encode(tokenizer, row["text"]) for row in TEXTS]
    examples = load(TEXTS, tokenizer, end_of_text="leave")
    require(examples, [(text, [True] * len(text)) for text in ids], PAD)
    # Packed, they follow each other.
    joined = ids[0] + ids[1]
    packed = load(TEXTS, tokenizer, end_of_text="leave", packed=True)
    require(packed, [(joined, [True] * len(joined))], PAD)


def test_nobody_is_asked_where_there_is_nothing_to_ask(plain, bare):
    def fail(examples: Examples) -> bool:
        raise AssertionError("asked")

    for rows, tokenizer, fields in [
        (PAIRS, bare, {}),
        (PAIRS, plain, {"end_of_text": "append"}),
        (PAIRS, plain, {"end_of_text": "leave"}),
        ([{"messages": messages} for messages in CHATS], plain, {}),
        ([{"text": "the red cat " * 9}], plain, {"max_length": 8}),  # no end within the length
        ([{"text": "the red cat</s>"}], plain, {}),
    ]:
        examples = load(rows, tokenizer, predicts_end=fail, **fields)
        assert examples.end_of_text == fields.get("end_of_text", "leave")
    refused("append, but the tokenizer has no eos_token", PAIRS, bare, end_of_text="append")


def test_prompts_that_hold_earlier_ends(plain):
    """Those belong to the prompt, unlike the one that a tokenizer adds."""
    rows = [{"prompt": "who ?</s>", "response": "cow"}]
    prompt, response = encode(plain, "who ?</s>"), [*encode(plain, "cow"), EOS]
    assert prompt[-1] == EOS
    counts = [False] * len(prompt) + [True] * len(response)
    require(load(rows, plain), [(prompt + response, counts)], PAD)


REWRITING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As templates that drop earlier thoughts."""


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = byte_tokenizer(chat_template=REWRITING)
    rows = [{"messages": messages} for messages in CHATS]
    refused("row 1: the chat template rewrites earlier turns.*set predict: all", rows, tokenizer)
    # Nothing is to be told apart where there is one answer, or where all tokens count.
    assert len(load(rows[:1], tokenizer)) == 1
    whole = tokenizer.apply_chat_template(CHATS[1])["input_ids"]
    examples = load(rows[1:], tokenizer, predict="all")
    require(examples, [(whole, [True] * len(whole))], PAD)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "hello"}], r"row 0: column 'messages' is to hold a list .*\{'content': 'hel"),
        ("hello", "row 0: column 'messages' is to hold a list of messages.* it holds 'hello'"),
        (["hello"], "is to hold a list of messages"),
        ([], r"it holds \[\]"),
        (None, "it holds None"),
        ([{"role": "judge", "content": "no"}], "row 0: .*cannot write .*: nobody is called judge"),
        ([{"role": "user", "content": [{"type": "image"}]}], "row 0: .* a part of type 'image'"),
    ],
)
def test_what_is_no_conversation(messages, message):
    template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'judge' %}{{ raise_exception('nobody is\ncalled judge') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    refused(message, [{"messages": messages}], byte_tokenizer(chat_template=template))


def test_one_message_without_a_role_among_others(plain):
    """`datasets` fills it up with None, which a template would write out."""
    rows = [{"messages": CHATS[0]}, {"messages": [{"content": "the cat"}, *CHATS[0]]}]
    refused("row 1: column 'messages' is to hold", rows, plain)


def test_templates_that_never_end(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    rows = [{"messages": messages} for messages in CHATS]
    message = "row 0: .* cannot write this conversation: it takes longer than 1 s or too much mem"
    refused(message, rows, byte_tokenizer(chat_template=endless))


def test_no_chat_template():
    rows = [{"messages": messages} for messages in CHATS]
    refused("row 0: .*chat_template is not set", rows, byte_tokenizer(chat_template=None))


def test_a_tokenizer_that_does_not_tell_characters():
    rows = [{"messages": messages} for messages in CHATS]
    refused(r"the tokenizer \(ByT5Tokenizer\) does not say which characters", rows, ByT5Tokenizer())
    assert len(load(PAIRS, ByT5Tokenizer())) == 3


def test_packing(plain):
    joined: list[int] = []
    counts: list[bool] = []
    for row in PAIRS:
        prompt, response = encode(plain, row["prompt"]), [*encode(plain, row["response"]), EOS]
        joined += prompt + response
        counts += [False] * len(prompt) + [True] * len(response)
    # The cut falls into the second example; the last piece is shorter.
    pieces = [(joined[at : at + 20], counts[at : at + 20]) for at in range(0, len(joined), 20)]
    assert len(pieces) >= 2 and len(joined) % 20
    require(load(PAIRS, plain, packed=True, max_length=20), pieces, PAD)


def test_packing_cuts_nothing_off(plain, caplog):
    with caplog.at_level(logging.WARNING):
        tell_cut(load(TEXTS * 9, plain, packed=True, max_length=5), NAME)
    assert "cut" not in caplog.text


def test_what_is_cut_and_left_out_is_told(plain, caplog):
    prompt = "the red cat runs . " * 2
    rows = [{"prompt": prompt, "response": "yes"}, *PAIRS[:2]]
    length = len(encode(plain, prompt))
    with caplog.at_level(logging.WARNING):
        examples = load(rows, plain, max_length=length)
    full = []
    for row in PAIRS[:2]:
        first, last = encode(plain, row["prompt"]), [*encode(plain, row["response"]), EOS]
        full.append((first + last, [False] * len(first) + [True] * len(last)))
    assert len(full[0][0]) <= length < len(full[1][0])
    require(examples, [(ids[:length], counts[:length]) for ids, counts in full], PAD)
    assert caplog.messages == [
        f"{NAME}: 1 of 3 examples are left out: no token to predict within max_length={length}",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tell_cut(examples, NAME)
        tell_cut(Subset(examples, np.array([1])), NAME)
        tell_cut(Subset(examples, np.array([0])), NAME)  # the one that is not cut
    assert caplog.messages == [
        f"{NAME}: {cut} examples are cut to max_length={length} tokens"
        for cut in ("1 of 2", "1 of 1")
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tell_cut(load(PAIRS, plain), NAME)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ([{"prompt": "the red cat runs .", "response": "yes"}], {"max_length": 3}),
        ([{"prompt": "a", "response": "b"}], {"max_length": 1, "predict": "all"}),
        ([{"messages": CHATS[0][:1]}], {}),
    ],
)
def test_nothing_to_predict_at_all(plain, rows, fields):
    refused(
        "no example of data.jsonl has a token to predict within max_length=", rows, plain, **fields
    )


def test_nothing_to_predict_in_texts_of_one_token(bare):
    refused("no example of data.jsonl has a token to predict", [{"text": "a"}], bare)


def test_which_columns_count(plain):
    row = {"messages": CHATS[0], **PAIRS[0], **TEXTS[0]}
    text = [*encode(plain, row["text"]), EOS]
    first, last = encode(plain, row["prompt"]), [*encode(plain, row["response"]), EOS]
    pair = (first + last, [False] * len(first) + [True] * len(last))
    chat = plain.apply_chat_template(CHATS[0], return_dict=True, return_assistant_tokens_mask=True)

    def without(*columns: str) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name not in columns}]

    marked = [mask == 1 for mask in chat["assistant_masks"]]
    require(load([row], plain, end_of_text="append"), [(chat["input_ids"], marked)], PAD)
    require(load(without("messages"), plain), [pair], PAD)
    # A prompt without a response is no pair.
    for gone in ("prompt", "response"):
        require(load(without("messages", gone), plain), [(text, [True] * len(text))], PAD)
    # Other names: what has the usual one is not looked at.
    renamed = [{"question": row["prompt"], "answer": row["response"], "prompt": 1, "text": 2}]
    require(load(renamed, plain, prompt="question", response="answer"), [pair], PAD)
    require(load([{"story": row["text"]}], plain, text="story"), [(text, [True] * len(text))], PAD)
    talk = [{"talk": CHATS[0], "text": "no"}]
    examples = load(talk, plain, messages="talk", end_of_text="append")
    require(examples, [(chat["input_ids"], marked)], PAD)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [{"words": "a", "prompt": "b"}],
            {},
            "data.jsonl has no column 'messages', or 'prompt' and 'response', or 'text'; "
            "its columns are words, prompt",
        ),
        ([{"text": "a"}], {"text": "words"}, "or 'words'; its columns are text"),
        ([{"text": "a"}, {"text": None}], {}, "row 1: column 'text' holds None, expected a text"),
        ([{"text": 3}], {}, "row 0: column 'text' holds 3"),
        ([{"prompt": "a", "response": None}], {}, "row 0: column 'response' holds None"),
        ([{"prompt": 1.5, "response": "b"}], {}, "row 0: column 'prompt' holds 1.5"),
        (
            [{"text": "a", "prompt": "b"}],
            {"decoder_start": 0},
            "has no column 'prompt' and 'response'; its columns are text, prompt",
        ),
        ([{"prompt": "a", "response": 1}], {"decoder_start": 0}, "column 'response' holds 1"),
        ([{"prompt": "a", "response": "b"}], {"decoder_start": 0, "packed": True}, "for decoders"),
    ],
)
def test_unusable_tables(plain, rows, fields, message):
    refused(message, rows, plain, **fields)


@pytest.mark.parametrize("kind", ["plain", "adding"])
def test_encoder_decoders(kind, request):
    tokenizer = request.getfixturevalue(kind)
    added = [BOS] if kind == "adding" else []
    examples = load(PAIRS, tokenizer, decoder_start=7)
    assert len(examples) == 3
    index = np.array([1, 2, 0])
    length = examples.padded_length(index)
    batch, labels = examples.take(index, length), examples.take_labels(index, length)
    for position, row in enumerate(index):
        prompt = added + encode(tokenizer, PAIRS[row]["prompt"]) + [EOS] * bool(added)
        response = [*added, *encode(tokenizer, PAIRS[row]["response"]), EOS]
        expected = {
            "input_ids": (prompt, PAD),
            "attention_mask": ([1] * len(prompt), 0),
            "decoder_input_ids": ([7, *response[:-1]], PAD),
            "decoder_attention_mask": ([1] * len(response), 0),
        }
        assert batch.keys() == expected.keys()
        for name, (values, filler) in expected.items():
            wanted = values + [filler] * (length - len(values))
            assert batch[name][position].tolist() == wanted, name
        assert labels[position].tolist() == response + [NOT_PREDICTED] * (length - len(response))
    # The longer of the two decides.
    assert examples.padded_length(np.array([0])) == 16 and length > 16


def test_encoder_decoders_cut_both_sides(plain, bare, caplog):
    rows = [*PAIRS, {"prompt": "the red cat " * 9, "response": "no"}]
    with caplog.at_level(logging.WARNING):
        examples = load(rows, plain, decoder_start=7, max_length=8)
        tell_cut(examples, NAME)
    assert caplog.messages == [f"{NAME}: 2 of 4 examples are cut to max_length=8 tokens"]
    index = np.arange(4)
    assert examples.padded_length(index) == 8
    batch, labels = examples.take(index, 8), examples.take_labels(index, 8)
    assert batch["input_ids"][3].tolist() == encode(plain, rows[3]["prompt"])[:8]
    assert labels[1].tolist() == encode(plain, rows[1]["response"])[:8]
    assert batch["decoder_input_ids"][1].tolist() == [7, *labels[1][:-1]]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(load(PAIRS, bare, decoder_start=7)) == 2
    assert "1 of 3 examples are left out: no token to predict" in caplog.text
    refused("no example of data.jsonl has a token to predict", PAIRS[2:], bare, decoder_start=7)


def load_file(root: Path, tokenizer: PreTrainedTokenizerBase | None, **fields: Any) -> Examples:
    return load_examples(
        DataSource(**fields),
        root=root,
        inputs=("input_ids", "attention_mask"),
        preprocessor=tokenizer,
        max_length=32,
        seed=0,
        name=NAME,
        language=True,
    )


def test_limit_draws_with_the_seed(tmp_path, plain):
    words = [" ".join(["red cat"] * (count % 5 + 1)) + f" {count}" for count in range(30)]
    write_json_lines(tmp_path / "data.jsonl", [{"text": text} for text in words])
    everything = load_file(tmp_path, plain, path="data.jsonl")
    limited = load_file(tmp_path, plain, path="data.jsonl", limit=4)
    assert len(everything) == 30 and len(limited) == 4
    assert len(load_file(tmp_path, plain, path="data.jsonl", limit=99)) == 30
    again = load_file(tmp_path, plain, path="data.jsonl", limit=4)
    index = np.array([3, 0])
    ids = limited.take(index, 32)["input_ids"]
    np.testing.assert_array_equal(again.take(index, 32)["input_ids"], ids)
    every = everything.take(np.arange(30), 32)["input_ids"].tolist()
    chosen = [every.index(row) for row in limited.take(np.arange(4), 32)["input_ids"].tolist()]
    assert chosen == sorted(set(chosen)) and chosen != [0, 1, 2, 3]
    labels = limited.take_labels(index, 32)
    wanted = everything.take_labels(np.array(chosen)[index], 32)
    np.testing.assert_array_equal(labels, wanted)
    assert (labels != NOT_PREDICTED).any()


def test_labels_of_a_subset_of_a_subset(plain):
    examples = load(PAIRS + TEXTS_AS_PAIRS, plain)
    inner = Subset(examples, np.array([4, 1, 0]))
    outer = Subset(inner, np.array([2, 0]))
    found = outer.take_labels(np.array([1, 0, 1]), 32)
    wanted = examples.take_labels(np.array([4, 0, 4]), 32)
    np.testing.assert_array_equal(found, wanted)
    assert outer.labels is None


def test_numpy_files_are_refused(tmp_path, plain):
    np.savez(tmp_path / "data.npz", input_ids=np.zeros((3, 4), np.int32))
    with pytest.raises(InputError, match="are texts, not NumPy arrays") as caught:
        load_file(tmp_path, plain, path="data.npz")
    assert str(caught.value).startswith(f"{NAME}: data.npz")


def test_no_tokenizer(tmp_path):
    write_json_lines(tmp_path / "data.jsonl", TEXTS)
    with pytest.raises(InputError, match="neither the base nor an expert comes with a tokenizer"):
        load_file(tmp_path, None, path="data.jsonl")
