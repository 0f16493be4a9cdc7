"""Tokens that a model does not have are refused: JAX would read the nearest ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from adamerge_jax.data.examples import Examples
from adamerge_jax.data.language import make_language_examples
from adamerge_jax.data.sources import load_examples
from adamerge_jax.data.tables import Table
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import DataSource
from tests.language_references import byte_tokenizer
from tests.references import bert_tokenizer, write_json_lines

LIMITS = TokenLimits(vocabulary=31, longest=8, types=2)
NAME = "calibration data of task 'x'"
IDS = np.array([[2, 7, 3, 0], [2, 30, 9, 3]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
NAN = np.where(IDS == 9, np.nan, MASK)


def load(root: Path, tokenizer: Any, path: str, limits: TokenLimits | None = LIMITS) -> Examples:
    return load_examples(
        DataSource(path=path, text=("text", "other") if path == "pairs.jsonl" else "text"),
        root=root,
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        preprocessor=tokenizer,
        max_length=20,
        seed=0,
        name=NAME,
        limits=limits,
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": IDS + 1}, "input_ids go from 1 to 31, the model's tokens from 0 to 30"),
        ({"input_ids": IDS - 1}, "input_ids go from -1 to 29"),
        ({"input_ids": IDS * 1.0}, "input_ids are float64, expected whole numbers"),
        ({"input_ids": np.ones((2, 9), int)}, "texts have 9 tokens, the model has positions for 8"),
        ({"attention_mask": NAN}, "attention_mask, row 1 holds a number that is NaN or infinite"),
        ({"attention_mask": MASK * 0.5}, "attention_mask holds 0.5; expected 1 for a token and 0"),
        ({"attention_mask": MASK * 2}, "attention_mask holds 2"),
        ({"attention_mask": -MASK}, "attention_mask holds -1"),
        ({"attention_mask": MASK * [[0], [1]]}, "attention_mask of row 0 has no 1"),
        ({"attention_mask": MASK.astype(str)}, "attention_mask holds <U21, expected numbers"),
        ({"token_type_ids": MASK * 9}, "token_type_ids go from 0 to 9, .* types from 0 to 1"),
        ({"token_type_ids": -MASK}, "token_type_ids go from -1 to 0"),
        ({"token_type_ids": NAN}, "token_type_ids, row 1 holds a number that is NaN"),
        ({"token_type_ids": MASK * 1.0}, "token_type_ids are float64, expected whole numbers"),
    ],
)
def test_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **({"input_ids": IDS} | arrays))
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, None, "data.npz")
    assert str(caught.value).startswith(f"{NAME}: {tmp_path / 'data.npz'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float16])
def test_masks_of_all_dtypes(tmp_path, dtype):
    mask = MASK.astype(dtype)
    np.savez(tmp_path / "data.npz", input_ids=IDS, attention_mask=mask, token_type_ids=MASK)
    batch = load(tmp_path, None, "data.npz").take(np.array([0, 1]), 8)
    assert batch["attention_mask"].dtype == np.int32
    assert batch["attention_mask"][:, :4].tolist() == MASK.tolist()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39])
def test_pixels(tmp_path, value):
    pixels = np.zeros((3, 1, 2, 2))
    pixels[2, 0, 1, 1] = value
    np.savez(tmp_path / "data.npz", pixel_values=pixels)
    with pytest.raises(InputError, match="pixel_values, row 2 holds a number that is NaN or inf"):
        load_examples(
            DataSource(path="data.npz"),
            root=tmp_path,
            inputs=("pixel_values",),
            preprocessor=None,
            max_length=20,
            seed=0,
            name=NAME,
        )


def test_texts(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    rows = [{"text": "a b", "other": "c"}, {"text": "a z", "other": "b"}]
    write_json_lines(tmp_path / "texts.jsonl", rows)
    write_json_lines(tmp_path / "pairs.jsonl", rows)
    for file in ("texts.jsonl", "pairs.jsonl"):
        assert len(load(tmp_path, tokenizer, file)) == len(load(tmp_path, tokenizer, file, None))
    few = LIMITS._replace(vocabulary=30)
    message = "^calibration data of task 'x', row 1: the tokenizer gives a token 30, the model has"
    with pytest.raises(InputError, match=f"{message} tokens 0 to 29; the tokenizer is another mod"):
        load(tmp_path, tokenizer, "texts.jsonl", few)
    one = LIMITS._replace(types=1)
    assert len(load(tmp_path, tokenizer, "texts.jsonl", one)) == 2
    with pytest.raises(InputError, match=r"row 0: the tokenizer gives a type 1, .* types 0 to 0"):
        load(tmp_path, tokenizer, "pairs.jsonl", one)


def test_texts_that_cannot_be(tmp_path):
    write_json_lines(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": ""}])
    with pytest.raises(InputError, match="row 1: the text has no token; leave it out"):
        load(tmp_path, byte_tokenizer(), "texts.jsonl", None)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> " * 20 + "$A", special_tokens=[("<s>", 1)]
    )
    with pytest.raises(InputError, match=r"max_length=20 has no room .* adds 20 tokens"):
        load(tmp_path, tokenizer, "texts.jsonl", None)


ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": "the"}, {"text": "the black cow"}],
    "pairs": [{"prompt": "the", "response": " the"}, {"prompt": "the", "response": " cow sings"}],
    "chats": [
        {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cow"}]}
    ],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("decoder_start", [None, 0])
def test_language_models(kind, decoder_start):
    """As many as the largest token, or one less."""
    if decoder_start is not None and kind != "pairs":
        pytest.skip("an encoder-decoder takes prompts with responses")
    tokenizer = byte_tokenizer()
    texts = [text for row in ROWS[kind] for text in row.values() if isinstance(text, str)]
    texts += [message["content"] for row in ROWS[kind] for message in row.get("messages", [])]
    texts += ["assistant", "user"] if kind == "chats" else []
    largest = max(token for text in texts for token in tokenizer(text)["input_ids"])
    table = Table.of_rows(ROWS[kind], DataSource(path="data"), NAME)

    def make(vocabulary: int) -> Examples:
        return make_language_examples(
            table,
            tokenizer,
            max_length=40,
            decoder_start=decoder_start,
            predicts_end=lambda few: True,
            limits=TokenLimits(vocabulary, None),
        )

    assert len(make(largest + 1)) == len(ROWS[kind])
    with pytest.raises(InputError, match=f"the tokenizer gives a token {largest}, the model has"):
        make(largest)


def test_an_end_of_text_that_the_model_lacks():
    tokenizer = byte_tokenizer(eos_token="<added>")
    vocabulary = len(tokenizer) - 1
    for end, refused in [("leave", False), ("append", True), ("auto", True)]:
        source = DataSource(path="data", end_of_text=end)
        table = Table.of_rows(ROWS["texts"], source, NAME)
        options: dict[str, Any] = {"max_length": 40, "decoder_start": None}
        options |= {"predicts_end": lambda few: True, "limits": TokenLimits(vocabulary, None)}
        if not refused:
            # Of one token nothing is predicted.
            assert len(make_language_examples(table, tokenizer, **options)) == 1
            continue
        with pytest.raises(InputError, match=f"end of text, .* gives a token {vocabulary}, the"):
            make_language_examples(table, tokenizer, **options)
