import csv
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import BertTokenizer, ViTImageProcessorPil

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.examples import Concatenated, Examples, bucket_length
from adamerge_jax.data.images import ImageProcessor
from adamerge_jax.data.sources import load_examples
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import DataSource
from tests.references import bert_tokenizer, save_image, write_json_lines

ROWS = [
    {"text": "a b c", "other": "d", "label": 2},
    {"text": "e", "other": "f g", "label": 0},
    {"text": "h i", "other": "", "label": 1},
]
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    return bert_tokenizer(tmp_path)


@pytest.fixture
def processor(tmp_path: Path) -> ImageProcessor:
    ViTImageProcessorPil(size=dict(height=4, width=4)).save_pretrained(tmp_path)
    return ImageProcessor(ViTImageProcessorPil.from_pretrained(tmp_path), (3, 4, 4))


def load(root: Path, preprocessor: Any, **fields: Any) -> Examples:
    text = preprocessor is None or isinstance(preprocessor, BertTokenizer)
    return load_examples(
        DataSource(**fields),
        root=root,
        inputs=TEXT_INPUTS if text else ("pixel_values",),
        preprocessor=preprocessor,
        max_length=20,
        seed=0,
        name="test data of task 'x'",
    )


def refused(match: str, *arguments: Any, **fields: Any) -> None:
    """Loading raises an InputError of one line that names the data and says `match`."""
    with pytest.raises(InputError, match=match) as caught:
        load(*arguments, **fields)
    assert str(caught.value).startswith("test data of task 'x'")
    assert "\n" not in str(caught.value)


def write_table(file: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".jsonl":
        write_json_lines(file, rows)
    else:
        with file.open("w", newline="") as stream:
            separator = "\t" if file.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, rows[0].keys(), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_tables(tmp_path, tokenizer, suffix):
    write_table(tmp_path / f"data.{suffix}")
    examples = load(tmp_path, tokenizer, path=f"data.{suffix}", label="label")
    assert len(examples) == 3
    assert examples.labels.tolist() == [2, 0, 1]
    batch = examples.take(np.array([1, 0]), 16)
    reference = tokenizer(["e", "a b c"], padding="max_length", max_length=16, return_tensors="np")
    assert batch.keys() == set(TEXT_INPUTS)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, reference[name])


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_words_for_nothing_are_texts(tmp_path, tokenizer, suffix):
    words = ["None", "null", "NA", "N/A", "nan", ""]
    rows = [{"text": word, "label": row} for row, word in enumerate(words)]
    write_table(tmp_path / f"data.{suffix}", rows)
    examples = load(tmp_path, tokenizer, path=f"data.{suffix}", label="label")
    assert examples.labels.tolist() == list(range(6))
    expected = tokenizer(words, padding="max_length", max_length=16, return_tensors="np")
    found = examples.take(np.arange(6), 16)["input_ids"]
    np.testing.assert_array_equal(found, expected["input_ids"])


def test_an_empty_label_of_a_csv_is_named(tmp_path, tokenizer):
    (tmp_path / "data.csv").write_text("text,label\na,0\nb,1\nc,\n")
    message = "label column 'label' of data.csv .* class indices.*row 2 holds ''"
    refused(message, tmp_path, tokenizer, path="data.csv", label="label")


def test_rows_that_a_quotation_mark_swallows(tmp_path, tokenizer):
    rows = ['a\t"b\t0', "c\td\t1", 'e\t"f\t2', "g\th\t3"]
    (tmp_path / "data.tsv").write_text("\n".join(["text\tother\tlabel", *rows, ""]))
    refused("data.tsv, line 2: .*quotes.*jsonl", tmp_path, tokenizer, path="data.tsv")
    (tmp_path / "data.tsv").write_text("\n".join(["text\tother\tlabel", *rows[:2], 'e\t"\t2', ""]))
    message = "data.tsv, row 0: column 'other' holds a text with a tab and a line break.*jsonl"
    fields = dict(path="data.tsv", text=["text", "other"], label="label")
    refused(message, tmp_path, tokenizer, **fields)
    # Quoted as the message says, tabs or line breaks included.
    rows = [
        {"text": '"b', "label": 0},
        {"text": "c\td", "label": 1},
        {"text": 'e\n"f"', "label": 2},
    ]
    write_table(tmp_path / "data.tsv", rows)
    examples = load(tmp_path, tokenizer, path="data.tsv", label="label")
    assert examples.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["train[1].jsonl", "data [v1]/train?.jsonl", "*.jsonl"])
def test_names_of_files_are_no_patterns(tmp_path, tokenizer, name):
    write_table(tmp_path / "train1.jsonl", [{"text": "a", "label": 1}])
    write_table(tmp_path / name, [{"text": "a", "label": 7}])
    assert load(tmp_path, tokenizer, path=name, label="label").labels.tolist() == [7]


def test_labels_are_not_read_unless_asked_for(tmp_path, tokenizer):
    write_table(tmp_path / "data.jsonl")
    assert load(tmp_path, tokenizer, path="data.jsonl").labels is None


def test_text_pairs(tmp_path, tokenizer):
    write_table(tmp_path / "data.jsonl")
    examples = load(tmp_path, tokenizer, path="data.jsonl", text=["text", "other"])
    reference = tokenizer(["a b c", "e"], ["d", "f g"], padding="max_length", max_length=16)
    batch = examples.take(np.array([0, 1]), 16)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, reference[name])
    assert batch["token_type_ids"].any()


def test_padding(tmp_path, tokenizer):
    texts = [" ".join("a" * count) for count in (14, 15, 18, 40)]
    write_table(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    examples = load(tmp_path, tokenizer, path="data.jsonl")
    # Two more tokens than words, and max_length 20 under the bucket of 24.
    assert [examples.padded_length(np.array([i])) for i in range(4)] == [16, 20, 20, 20]
    assert examples.padded_length(np.array([0, 2])) == 20
    cut = examples.take(np.array([3]), 20)["input_ids"][0]
    assert cut[-1] == tokenizer.sep_token_id
    assert examples.cut.examples.tolist() == [False, False, False, True]


@pytest.mark.parametrize("text", ["a b " * 2_500_000, "a" * 10**5, " " * 10**5 + "a b"])
def test_texts_of_megabytes(tmp_path, tokenizer, text):
    write_table(tmp_path / "data.jsonl", [{"text": text, "other": "c d"}])
    start = time.process_time()
    examples = load(tmp_path, tokenizer, path="data.jsonl", text=["text", "other"])
    assert time.process_time() - start < 8
    short = text[:50_000] if "a b a" in text else text.strip()
    ids = tokenizer(short, "c d", truncation=True, max_length=20)["input_ids"]
    assert examples.take(np.array([0]), 20)["input_ids"][0, : len(ids)].tolist() == ids
    assert examples.cut.examples.tolist() == ["a b a" in text]


def test_bucket_lengths():
    buckets = [bucket_length(length) for length in range(1, 513)]
    assert sorted(set(buckets)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(bucket >= length for length, bucket in enumerate(buckets, start=1))
    assert all(bucket <= max(16, 1.5 * length) for length, bucket in enumerate(buckets, start=1))


def test_limit_draws_with_the_seed(tmp_path, tokenizer):
    rows = [{"text": "a " * (i % 17 + 1), "label": i} for i in range(40)]
    write_table(tmp_path / "data.jsonl", rows)
    everything = load(tmp_path, tokenizer, path="data.jsonl", label="label")
    limited = load(tmp_path, tokenizer, path="data.jsonl", label="label", limit=5)
    assert len(limited) == 5
    assert len(set(limited.labels.tolist())) == 5
    assert limited.labels.tolist() != list(range(5))
    again = load(tmp_path, tokenizer, path="data.jsonl", label="label", limit=5)
    np.testing.assert_array_equal(again.labels, limited.labels)
    first = np.array([2])
    wanted = everything.take(limited.labels[first], 24)
    np.testing.assert_array_equal(limited.take(first, 24)["input_ids"], wanted["input_ids"])
    assert limited.padded_length(first) == everything.padded_length(limited.labels[first])
    assert len(load(tmp_path, tokenizer, path="data.jsonl", limit=100)) == 40


def test_numpy_files(tmp_path):
    ids = np.arange(12).reshape(4, 3)
    np.savez(tmp_path / "data.npz", input_ids=ids, unused=np.zeros(4), y=np.array([0, 1, 0, 1]))
    examples = load(tmp_path, None, path="data.npz", label="y")
    assert examples.labels.tolist() == [0, 1, 0, 1]
    batch = examples.take(np.array([3, 0]), examples.padded_length(np.array([3, 0])))
    assert batch.keys() == {"input_ids"}
    np.testing.assert_array_equal(batch["input_ids"], ids[[3, 0]])


# `datasets` reads a folder called `test` as the split of that name.
@pytest.mark.parametrize(("folder", "split"), [("train", "train"), ("test", "test"), ("", "train")])
def test_image_folders(tmp_path, processor, folder, split):
    generator = np.random.default_rng(0)
    images = {name: generator.integers(0, 256, (4, 4, 3)) for name in ("big_cat", "dog")}
    for name, pixels in images.items():
        save_image(tmp_path / "images" / folder / name / "0.png", pixels)
    examples = load(tmp_path, processor, path="images", split=split, label="label")
    assert examples.class_names == ["big cat", "dog"]
    assert examples.labels.tolist() == [0, 1]
    batch = examples.take(np.array([1, 0]), 0)
    expected = np.stack([images["dog"], images["big_cat"]]).transpose(0, 3, 1, 2)
    # Already 4 x 4, so that the processor scales and normalises only.
    np.testing.assert_allclose(batch["pixel_values"], expected / 127.5 - 1, atol=1e-6)
    again = examples.take(np.array([1]), 0)
    np.testing.assert_array_equal(again["pixel_values"][0], batch["pixel_values"][0])


def test_names_of_image_folders_are_no_patterns(tmp_path, processor):
    for name in ("cat", "dog"):
        save_image(tmp_path / "images [v1]" / name / "0.png", np.zeros((4, 4, 3)))
    assert load(tmp_path, processor, path="images [v1]", label="label").labels.tolist() == [0, 1]


def test_grey_images_become_rgb(tmp_path, processor):
    save_image(tmp_path / "images" / "0.png", np.arange(16).reshape(4, 4))
    pixels = load(tmp_path, processor, path="images").take(np.array([0]), 0)["pixel_values"]
    assert pixels.shape == (1, 3, 4, 4)
    np.testing.assert_array_equal(pixels[:, 0], pixels[:, 2])


def test_broken_images_are_named(tmp_path, processor):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    refused(r"image 0 \(.*broken\.png\): .* no image", tmp_path, processor, path="images")


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (ROWS, {"text": "words"}, "has no column 'words'; its columns are text, other, label"),
        (ROWS, {"label": "y"}, "has no column 'y'"),
        (ROWS, {"text": ["text", "more"]}, "has no column 'more'"),
        ([{"text": "a"}, {"text": None}], {}, "row 1: column 'text' holds None"),
        ([{"text": 1}, {"text": 2}], {}, "row 0: column 'text' holds 1"),
        (
            [{"text": "a", "label": 1}, {"text": "a", "label": "yes"}],
            {"label": "label"},
            "row 1 holds 'yes'",
        ),
        ([{"text": "a", "label": " "}], {"label": "label"}, "row 0 holds ' '"),
        ([{"text": "a", "label": 2**40}], {"label": "label"}, "row 0 holds 1099511627776"),
        ([{"text": "a", "label": 2**70}], {"label": "label"}, "row 0 holds 11805916207174"),
        ([{"text": "a", "label": float("nan")}], {"label": "label"}, "row 0 holds nan"),
        ([{"text": "a"}, {"label": 1}], {}, "row 1: column 'text' holds None"),
        ([{"text": "a"}, {"text": "\ud800"}], {}, "row 1: column 'text' holds half of a character"),
        ([{"text": "a", "label": True}], {"label": "label"}, "row 0 holds True"),
        ([{"text": "a", "label": 0.5}], {"label": "label"}, "row 0 holds 0.5"),
        (
            [{"text": "a", "label": 0}, {"text": "a", "label": -1}],
            {"label": "label"},
            "class indices.*row 1 holds -1",
        ),
        (
            [{"text": "a", "label": 0}, {"text": "a", "label": None}],
            {"label": "label"},
            "class indices.*row 1 holds None",
        ),
        ([{"text": "a", "label": [0, 1]}], {"label": "label"}, r"row 0 holds \[0, 1\]"),
    ],
)
def test_unusable_rows(tmp_path, tokenizer, rows, fields, message):
    write_table(tmp_path / "data.jsonl", rows)
    refused(message, tmp_path, tokenizer, path="data.jsonl", **fields)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", None, "no such file"),
        ("data.npz", None, "no such file"),
        ("data.jsonl", b"", "data.jsonl has no examples"),
        ("data.csv", b"", "data.csv has no examples"),
        ("data.csv", b"text,label\n", "data.csv has no examples"),
        ("data.jsonl", b"{no json\n", "data.jsonl, line 1: is no JSON"),
        ("data.parquet", b"no parquet", "data.parquet cannot be read"),
        ("data.npz", b"no npz", "is no readable .npz file"),
        ("data.npz", b"", "is no readable .npz file"),
        ("data.npz", b"PK\x03\x04 cut off", "is no readable .npz file"),
        ("data", None, "data is no file here, and the data set of the Hub cannot be read"),
    ],
)
def test_unusable_files(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(message, tmp_path, tokenizer, path=name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, "has no array 'input_ids'; its arrays are x"),
        ({"input_ids": np.zeros((2, 3))}, "has no array 'y'"),
        ({"input_ids": np.zeros((2, 3)), "y": np.zeros(3, int)}, "differ in their number"),
        ({"input_ids": np.zeros((2, 3)), "y": np.array(3)}, "differ in their number"),
        ({"input_ids": np.array(1), "y": np.array(3)}, "differ in their number"),
        ({"input_ids": np.zeros((0, 3)), "y": np.zeros(0, int)}, "has no examples"),
        ({"input_ids": np.zeros((2, 3)), "y": np.zeros(2)}, "row 0 holds 0.0"),
        ({"input_ids": np.zeros(2), "y": np.zeros(2, int)}, r"shapes input_ids \(2,\); expected"),
        (
            {
                "input_ids": np.zeros((2, 3)),
                "attention_mask": np.ones((2, 4)),
                "y": np.zeros(2, int),
            },
            r"data.npz: token arrays .* input_ids \(2, 3\), attention_mask \(2, 4\); expected",
        ),
        ({"input_ids": np.array([None, None])}, "is no readable .npz file"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    refused(message, tmp_path, None, path="data.npz", label="y")


def test_nothing_to_preprocess_with(tmp_path):
    write_table(tmp_path / "data.jsonl")
    refused(
        "neither the base nor an expert comes with a tokenizer", tmp_path, None, path="data.jsonl"
    )


def test_a_column_that_holds_no_images(tmp_path, processor):
    write_table(tmp_path / "data.jsonl")
    refused(
        "column 'text' of data.jsonl holds no images",
        tmp_path,
        processor,
        path="data.jsonl",
        image="text",
    )


def test_progress_bars_stay_as_they_were(tmp_path, tokenizer):
    write_table(tmp_path / "data.jsonl")
    datasets.enable_progress_bars()
    load(tmp_path, tokenizer, path="data.jsonl")
    assert datasets.utils.logging.is_progress_bar_enabled()


def test_concatenated_examples(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    short = TextExamples(["a", "b c"], tokenizer, 32, "short")
    long = TextExamples(["d " * 20, "e"], tokenizer, 32, "long")
    both = Concatenated([short, long])
    assert len(both) == 4
    assert both.padded_lengths().tolist() == [16, 16, 24, 16]
    index = np.array([3, 0, 2])
    taken = both.take(index, both.padded_length(index))
    for row, (part, own) in enumerate([(long, 1), (short, 0), (long, 0)]):
        for name, array in part.take(np.array([own]), 24).items():
            np.testing.assert_array_equal(taken[name][row], array[0])


def test_token_arrays_beside_texts(tmp_path):
    texts = TextExamples(["a", "b " * 20], bert_tokenizer(tmp_path), 32, "texts")
    ids = np.arange(5, 41).reshape(2, 18)
    arrays = ArrayExamples({"input_ids": ids})
    for parts in ([texts, arrays], [arrays, texts]):
        both = Concatenated(parts)
        start = 2 * (parts[0] is texts)
        for other, length in ((0, 18), (1, 24)):
            index = np.array([2 - start + other, start + 1])
            assert both.padded_length(index) == length
            taken = both.take(index, length)
            assert taken.keys() == set(TEXT_INPUTS)
            for name, array in texts.take(np.array([other]), length).items():
                np.testing.assert_array_equal(taken[name][0], array[0])
            np.testing.assert_array_equal(taken["input_ids"][1, :18], ids[1])
            mask = np.arange(length) < 18
            np.testing.assert_array_equal(taken["attention_mask"][1], mask)
            assert not taken["token_type_ids"][1].any()
