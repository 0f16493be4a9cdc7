"""Conversations with images: what is read, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    Gemma4ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2VLImageProcessorPil,
)

from adamerge_jax.data.examples import (
    Concatenated,
    drawn,
    require_joinable,
    with_as_many_images,
)
from adamerge_jax.data.image_conversations import ConversationImages
from adamerge_jax.data.processors import Processor, load_processor
from adamerge_jax.data.sources import load_examples
from adamerge_jax.errors import InputError
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.recipes.schema import DataSource
from tests.language_references import SPECIAL, byte_tokenizer
from tests.references import save_image, write_json_lines
from tests.vision_language_references import TEMPLATE, conversation, image_tokenizer


def processor(
    folder: Path,
    size: tuple[int, int] | None = (16, 16),
    model_type: str = "qwen2_vl",
    template: str | None = TEMPLATE,
) -> Processor:
    """The processor of a folder of a model whose tokens have no positions of their own."""
    tokenizer = image_tokenizer(template)
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    model = SimpleNamespace(token=token, positions=lambda tokens, grid: None)
    config = SimpleNamespace(model_type=model_type)
    checkpoint = SimpleNamespace(folder=folder, source="model", config=config)
    return load_processor(checkpoint, "base", tokenizer, model, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a processor, images and a damaged one."""
    root = tmp_path_factory.mktemp("images") / "data"
    root.mkdir()
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024).save_pretrained(root)
    generator = np.random.default_rng(0)
    for name, size in {"cat": (20, 30), "dog": (16, 16), "../outside": (8, 8)}.items():
        save_image(root / f"{name}.png", generator.integers(0, 256, (*size, 3)))
    (root / "cut.png").write_bytes((root / "cat.png").read_bytes()[:600])
    (root / "text.png").write_text("no image")
    return root


def read(
    rows: list[dict[str, Any]],
    folder: Path,
    reader: Processor | None = None,
    max_length: int = 64,
    **fields: Any,
) -> Any:
    file = write_json_lines(folder / "rows.jsonl", rows)
    reader = reader or processor(folder)
    return load_examples(
        DataSource(path=str(file), **fields),
        root=folder,
        inputs=("input_ids", "attention_mask", PIXELS),
        preprocessor=reader.tokenizer,
        max_length=max_length,
        seed=0,
        name="data",
        language=True,
        processor=reader,
    )


def test_images_stand_beside_their_tokens(folder):
    reader = processor(folder)
    rows = [
        conversation(["cat.png"], "which one ?", "the cat"),
        conversation([], "which one ?", "none"),
        conversation(["dog.png", "cat.png"], "which one ?", "the dog"),
    ]
    rows[1]["messages"][0]["content"] = "which one ?"  # a text alone
    examples = read(rows, folder, reader)
    index = np.array([0, 1, 2])
    inputs = examples.take(index, 64)
    assert inputs[COUNT].tolist() == [1, 0, 2]
    assert inputs[PIXELS].shape == (3, 2, 1, 4, 4, 96)
    assert (inputs["input_ids"] == reader.model.token).sum(-1).tolist() == [4, 0, 8]
    np.testing.assert_array_equal(inputs[PIXELS][0, 0], inputs[PIXELS][2, 1])
    assert not inputs[PIXELS][0, 1].any() and not inputs[PIXELS][1].any()
    labels = examples.take_labels(index, 64)
    answers = [reader.tokenizer.decode(row[row != NOT_PREDICTED]) for row in labels]
    assert answers == ["the cat", "none", "the dog"]


def test_images_are_never_predicted(folder):
    reader = processor(folder)
    examples = read([conversation(["cat.png"], "?", "cat")], folder, reader, predict="all")
    labels = examples.take_labels(np.array([0]), 64)
    assert reader.model.token not in labels and (labels != NOT_PREDICTED).sum() > 8


def test_tasks_with_and_without_images_share_a_batch(folder):
    reader = processor(folder)
    some = read([conversation(["cat.png"], "?", "cat")], folder, reader)
    none = read([conversation([], "?", "cat")], folder, reader)
    texts = read([{"text": "the cat runs ."}], folder, reader)
    require_joinable({"some": some, "none": none, "texts": texts})
    inputs = Concatenated([none, some, texts]).take(np.arange(3), 32)
    assert inputs[COUNT].tolist() == [0, 1, 0]
    assert inputs[PIXELS].shape == (3, 1, 1, 4, 4, 96) and inputs[PIXELS][1].any()


def test_a_conversation_whose_image_is_cut_is_left_out(folder, caplog):
    rows = [
        conversation(["dog.png"], "the cat runs", "the cat"),
        conversation([], "the cat", "the cat"),
    ]
    reader = processor(folder)
    for row in rows:  # so that there is something to predict before the end of the image
        row["messages"].insert(0, {"role": "user", "content": "the cat"})
        row["messages"].insert(1, {"role": "assistant", "content": "the dog"})
    whole = read(rows, folder, reader).take(np.arange(2), 64)
    last = np.flatnonzero(whole["input_ids"][0] == reader.model.token)[-1]
    assert len(read(rows, folder, reader, max_length=int(last) + 1)) == 2
    assert len(read(rows, folder, reader, max_length=int(last))) == 1
    assert "1 of 2 examples are left out" in caplog.text
    assert f"left out: not all of its images within max_length={last}" in caplog.text
    message = r"no example of .* has a token to predict and all of its images within max_length="
    with pytest.raises(InputError, match=message):
        read(rows[:1], folder, reader, max_length=int(last))


def test_texts_of_a_model_of_images_are_packed(folder):
    reader = processor(folder)
    rows = [conversation([], "which one ?", answer) for answer in ("the cat", "the dog")]
    apart = read(rows, folder, reader).take(np.arange(2), 64)
    options = {"max_length": 8, "packed": True, "predict": "all"}
    packed = read(rows, folder, reader, **options)
    assert len(packed) > len(rows)
    inputs = packed.take(np.arange(len(packed)), 8)
    tokens, expected = (part["input_ids"][part["attention_mask"] == 1] for part in (inputs, apart))
    np.testing.assert_array_equal(tokens, expected)
    assert not inputs[COUNT].any()
    assert len(read(rows, folder, reader, **options, limit=3)) == 3


def test_images_of_rows_that_are_not_drawn_are_not_read(folder):
    reader = processor(folder)
    chosen = drawn(6, 2, seed=0)
    rows = [conversation(["cut.png"], "which one ?", str(row)) for row in range(6)]
    for row in chosen:
        rows[row] = conversation(["cat.png"], "which one ?", str(row))
    examples = read(rows, folder, reader, limit=2)
    labels = examples.take_labels(np.arange(2), 64)
    assert [reader.tokenizer.decode(row[row != NOT_PREDICTED]) for row in labels] == [
        str(row) for row in chosen
    ]
    with pytest.raises(InputError, match=r"cut\.png\): cannot be read"):
        read(rows, folder, reader)


def test_positions_are_computed_once(folder):
    reader, asked = processor(folder), []

    def positions(tokens: list[int], grid: Any) -> np.ndarray:
        asked.append(tokens)
        return np.stack([np.arange(len(tokens))] * 3)

    reader.model.positions = positions
    rows = [conversation(["cat.png"], "?", "cat"), conversation([], "which one ?", "cat")]
    examples = read(rows, folder, reader)
    for _ in range(2):
        inputs = examples.take(np.array([1, 0, 1]), 64)
        expected = np.arange(64) * inputs["attention_mask"]
        np.testing.assert_array_equal(inputs["position_ids"], expected[:, None].repeat(3, 1))
    assert len(asked) == 2


def test_images_are_copied_only_where_some_are_missing():
    images = np.ones((2, 2, 3), np.float32)
    parts = [
        {COUNT: np.array([2, 1]), PIXELS: images},
        {COUNT: np.array([1]), PIXELS: images[:1, :1]},
        {COUNT: np.array([0])},
    ]
    whole, filled, empty = (part[PIXELS] for part in with_as_many_images(parts))
    assert whole is images
    np.testing.assert_array_equal(filled, [[[1, 1, 1], [0, 0, 0]]])
    np.testing.assert_array_equal(empty, np.zeros((1, 2, 3)))
    assert filled.dtype == empty.dtype == np.float32


def image(**fields: Any) -> list[dict[str, Any]]:
    """A row with an image of such fields."""
    row = conversation(["cat.png"], "which one ?", "the cat")
    row["messages"][0]["content"][0] = {"type": "image", **fields}
    return [row]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (image(image="no.png"), r"row 0: there is no image 'no\.png' in .*data"),
        (image(image="../outside.png"), "row 0: image '../outside.png' is outside of the table's"),
        (image(image="/etc/passwd"), "image '/etc/passwd' is outside of the table's folder"),
        (image(path="https://host/a.png"), "'https://host/a.png' is no file; save it beside"),
        (image(image="a\0.png"), "cannot be a file's name"),
        (image(image="a" * 5000), "cannot be a file's name|there is no image"),
        (image(image="."), "there is no image"),
        (image(image=3), "expected the name of its file"),
        (image(), "expected the name of its file"),
        (image(image="cut.png"), r"row 0, image 0 \(.*cut\.png\): cannot be read: .*truncated"),
        (image(image="text.png"), r"text\.png\): cannot be read: it is no image"),
        (
            [conversation([], "<|image_pad|> ?", "a cat")],
            r"writes 1 time\(s\) '<\|image_pad\|>', and the conversation has 0 image\(s\)",
        ),
        (
            [conversation(["cat.png"], "one <|image_pad|> ?", "a cat")],
            r"writes 2 time\(s\) '<\|image_pad\|>', and the conversation has 1 image",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}],
            "a part of a message is .*video.*; expected",
        ),
        ([{"messages": [{"role": "user", "content": [3]}]}], "a part of a message is 3; expected"),
        ([{"messages": [{"role": "user", "content": None}]}], "content is None; expected"),
        ([{"messages": [{"role": "user", "content": 3}]}], "content is 3; expected"),
        ([{"messages": "what ?"}], "to hold a list of messages"),
        ([{"messages": [3]}], "to hold a list of messages"),
    ],
)
def test_bad_conversations_are_refused(rows, message, folder):
    with pytest.raises(InputError, match=message) as error:
        read(rows, folder)
    assert "\n" not in str(error.value)


def test_a_template_that_leaves_images_out_is_refused(folder):
    reader = processor(folder)
    reader.tokenizer.chat_template = TEMPLATE.replace("<|image_pad|>", "")
    with pytest.raises(InputError, match=r"writes 0 time\(s\).* has 1 image"):
        read([conversation(["cat.png"], "?", "cat")], folder, reader)


def test_a_template_in_a_file_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    row = conversation(["cat.png"], "?", "the cat")
    reader = processor(tmp_path, template=None)
    with pytest.raises(InputError, match="chat template cannot write"):
        read([row], tmp_path, reader)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    inputs, expected = (
        read([row], root, reader).take(np.array([0]), 32)["input_ids"]
        for root, reader in [
            (tmp_path, processor(tmp_path, template=None)),
            (folder, processor(folder)),
        ]
    )
    np.testing.assert_array_equal(inputs, expected)


def test_images_of_several_shapes_need_a_size(folder):
    apart = [conversation([name], "?", "cat") for name in ("dog.png", "cat.png")]
    with pytest.raises(InputError, match=r"row 1: its images become .* set image_size"):
        read(apart, folder, processor(folder, None))
    together = [conversation(["dog.png", "cat.png"], "?", "cat")]
    with pytest.raises(InputError, match=r"row 0.* grids of .* set image_size"):
        read(together, folder, processor(folder, None))


def test_images_in_a_table_are_read(folder, tmp_path):
    import datasets

    parts = [{"type": "image", "image": {"bytes": (folder / "cat.png").read_bytes()}, "text": None}]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "image": None, "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "image": None, "text": "the cat"}]},
    ]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "rows.parquet")
    reader = processor(folder)
    examples = load_examples(
        DataSource(path=str(tmp_path / "rows.parquet")),
        root=tmp_path,
        inputs=("input_ids", PIXELS),
        preprocessor=reader.tokenizer,
        max_length=64,
        seed=0,
        name="data",
        language=True,
        processor=reader,
    )
    from_file = read([conversation(["cat.png"], "?", "the cat")], folder, reader)
    for name, array in from_file.take(np.array([0]), 32).items():
        np.testing.assert_array_equal(examples.take(np.array([0]), 32)[name], array)


def test_images_in_pieces_count_as_several(tmp_path):
    """An Idefics 3 cuts large images into pieces, with tokens around each."""
    tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    tokenizer = byte_tokenizer(
        chat_template=template, tokens=[*SPECIAL, *tokens], additional_special_tokens=tokens[-1:]
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(tmp_path)
    save_image(tmp_path / "cat.png", np.zeros((20, 30, 3)) + 7)
    token = tokenizer.convert_tokens_to_ids("<image>")
    model = SimpleNamespace(token=token, positions=lambda tokens, grid: None)
    config = SimpleNamespace(model_type="idefics3")
    checkpoint = SimpleNamespace(folder=tmp_path, source="model", config=config)
    reader = load_processor(checkpoint, "base", tokenizer, model, None)
    examples = read([conversation(["cat.png"], "which ?", "cat")], tmp_path, reader, 256)
    inputs = examples.take(np.array([0]), 192)
    assert inputs[COUNT].tolist() == [5] and inputs[PIXELS].shape == (1, 5, 3, 16, 16)
    assert (inputs["input_ids"] == token).sum() == 5 * 4
    labels = examples.take_labels(np.array([0]), 192)[0]
    assert tokenizer.decode(labels[labels != NOT_PREDICTED]) == "cat"


def llava_next(folder: Path, size: tuple[int, int] | None) -> Processor:
    """The processor of a LLaVA-NeXT, which cuts images into tiles of 8 x 8 pixels."""
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    tokenizer = byte_tokenizer(chat_template=template, tokens=[*SPECIAL, "<image>"])
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[16, 8], [8, 16]],
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids("<image>")
    model = SimpleNamespace(token=token, positions=lambda tokens, grid: None)
    config = SimpleNamespace(model_type="llava_next")
    checkpoint = SimpleNamespace(folder=folder, source="model", config=config)
    return load_processor(checkpoint, "base", tokenizer, model, size)


def test_tiles_of_an_image_lie_beside_its_size(tmp_path):
    """A LLaVA-NeXT has 4 x 4 tokens for a whole image, and 4 x 8 for the tiles of a wide one."""
    reader = llava_next(tmp_path, (4, 16))
    save_image(tmp_path / "cat.png", np.zeros((20, 30, 3)) + 7)
    rows = [conversation(["cat.png"] * count, "which ?", "cat") for count in (1, 2)]
    examples = read(rows, tmp_path, reader, 256)
    inputs = examples.take(np.arange(2), 192)
    assert inputs[COUNT].tolist() == [1, 2] and inputs[PIXELS].shape == (2, 2, 3, 3, 8, 8)
    # Two rows of the tiles are padding; each of the others ends in a token of a new line.
    counts = (inputs["input_ids"] == reader.model.token).sum(axis=1)
    assert counts.tolist() == [34, 68]
    assert inputs[SIZES].shape == (2, 0, 4, 16)
    assert reader.grid is None
    blank = read([conversation([], "which ?", "cat")], tmp_path, reader, 256)
    first = examples.take(np.array([0]), 64)
    padded, other = with_as_many_images([blank.take(np.array([0]), 64), first])
    assert padded[SIZES].shape == other[SIZES].shape == (1, 0, 4, 16)
    assert padded[PIXELS].shape == other[PIXELS].shape


def test_tiled_images_of_two_sizes_are_refused(tmp_path):
    reader = llava_next(tmp_path, None)
    save_image(tmp_path / "wide.png", np.zeros((4, 16, 3)) + 7)
    save_image(tmp_path / "flat.png", np.zeros((2, 16, 3)) + 7)
    rows = [conversation([name], "which ?", "cat") for name in ("wide.png", "flat.png")]
    with pytest.raises(InputError, match=r"\(2, 16\) pixels, those before .*\(4, 16\) pixels"):
        read(rows, tmp_path, reader, 256)
    rows = [conversation(["wide.png", "flat.png"], "which ?", "cat")]
    with pytest.raises(InputError, match=r"tiles of images of \[4, 16\] and \[2, 16\] pixels"):
        read(rows, tmp_path, llava_next(tmp_path, None), 256)


def test_patches_with_places_lie_in_a_grid(tmp_path):
    """A Gemma 4 has rows of patches with padding behind them."""
    named = {f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi")}
    named |= {f"{name}_token": f"<{name}>" for name in ("audio", "boa", "eoa")}  # it wants them
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    tokenizer = byte_tokenizer(
        chat_template=template,
        tokens=[*SPECIAL, *named.values()],
        extra_special_tokens=named,
    )
    images = Gemma4ImageProcessorPil(patch_size=2, pooling_kernel_size=2, max_soft_tokens=70)
    images.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    save_image(tmp_path / "cat.png", generator.integers(0, 256, (20, 30, 3)))
    token = tokenizer.convert_tokens_to_ids("<image>")
    model = SimpleNamespace(token=token, positions=lambda tokens, grid: None)
    config = SimpleNamespace(model_type="gemma4")
    checkpoint = SimpleNamespace(folder=tmp_path, source="model", config=config)
    reader = load_processor(checkpoint, "base", tokenizer, model, (16, 24))
    examples = read([conversation(["cat.png"], "which ?", "cat")], tmp_path, reader, 256)
    inputs = examples.take(np.array([0]), 192)
    _, _, frames, height, width, features = inputs[PIXELS].shape
    assert frames == 1 and features == 3 * 2 * 2
    assert (inputs["input_ids"] == token).sum() == height * width // 4 <= 70
    resized = np.asarray(
        Image.open(tmp_path / "cat.png").resize((24, 16), Image.Resampling.BICUBIC)
    )
    expected = images([resized], return_tensors="np")
    patches = np.asarray(expected["pixel_values"])[0, : height * width]
    np.testing.assert_array_equal(inputs[PIXELS].reshape(-1, features), patches)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[8, 8], [10**5, 10**5]], "size": {"shortest_edge": 8}},
            "image_grid_pinpoints makes .* pieces",
        ),
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": "8"},
            "image_grid_pinpoints is '8'; expected",
        ),
        ("preprocessor_config.json", {"max_soft_tokens": 10**6}, "max_soft_tokens makes .* pieces"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std is .* above 0"),
        ("preprocessor_config.json", {"size": {"longest_edge": 10**12}}, "size.longest_edge is"),
        ("preprocessor_config.json", {"patch_size": 0}, "patch_size is 0; expected"),
        ("preprocessor_config.json", {"merge_size": "2"}, "merge_size is '2'; expected"),
        ("preprocessor_config.json", {"min_pixels": 10**12}, "min_pixels is 10+; expected"),
        ("preprocessor_config.json", {"patch_size": 1, "max_pixels": 2**25}, "makes .* pieces"),
        (
            "preprocessor_config.json",
            {"merge_size": None, "size": {"longest_edge": 9999}, "max_image_size": {}},
            r"max_image_size.longest_edge is None",
        ),
        ("preprocessor_config.json", {"max_patches": 10**6}, "max_patches makes 1000000 pieces"),
        ("processor_config.json", {"image_seq_length": 10**9}, "image_seq_length is 10+; expected"),
        (
            "processor_config.json",
            {"image_processor": {"patch_size": -1}},
            "image_processor in processor_config.json: patch_size is -1",
        ),
        ("processor_config.json", {"processor_class": "os.system"}, None),
        ("preprocessor_config.json", {"image_processor_type": "Own"}, "cannot be read"),
    ],
)
def test_bad_processors_are_refused(file, fields, message, folder, tmp_path):
    good = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(good))
    before = good if file == "preprocessor_config.json" else {}
    (tmp_path / file).write_text(json.dumps(before | fields))
    if message is None:  # a class that transformers lacks is that of the model
        assert processor(tmp_path).tokenizer is not None
        return
    with pytest.raises(InputError, match=message) as error:
        processor(tmp_path)
    assert "\n" not in str(error.value) and "model" in str(error.value)


def test_a_model_without_a_processor_of_transformers_is_refused(folder):
    with pytest.raises(InputError, match="no class of transformers"):
        processor(folder, model_type="bert")


def test_images_are_decoded_again_where_they_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr("adamerge_jax.data.image_conversations.IMAGE_CACHE_BYTES", 0)
    reader = processor(folder)
    row = conversation(["cat.png"], "?", "cat")
    examples = read([row], folder, reader)
    assert isinstance(examples._images, ConversationImages) and not examples._images._cache
    assert examples.take(np.array([0]), 32)[PIXELS].any()
