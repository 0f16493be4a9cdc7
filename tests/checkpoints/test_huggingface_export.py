import errno
import json
import logging
import os
import shutil
import stat
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    DeiTConfig,
    ViTConfig,
    ViTForImageClassification,
)

from adamerge_jax.checkpoints import huggingface_export, shards
from adamerge_jax.checkpoints.config_file import fields_of
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.huggingface_export import model_class, write_checkpoint
from adamerge_jax.errors import InputError

BERT = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=20,
)
ASSETS = ("tokenizer.json", "vocab.txt", "chat_template.jinja", "spiece.model", "merges.txt")


def one_line(caught) -> None:
    assert "\n" not in str(caught.value)


def small_tensors() -> dict[str, np.ndarray]:
    return {f"layer.{index}.weight": np.full((10, 10), index, np.float32) for index in range(5)}


def expert(folder: Path, *, seed: int, num_labels: int) -> BertForSequenceClassification:
    """A BERT classifier with a backbone that is the same for every seed and a head that is not."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=num_labels)).eval()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(f'"{seed}"')
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_file_when_it_fits(tmp_path, dtype):
    model = BertModel(BertConfig(**BERT), add_pooling_layer=True).eval()
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    with write_checkpoint(tmp_path / "out") as writer:
        for name in base.tensors:
            writer.add(name, base.read(name).astype(dtype))
        writer.write_config(base.config_fields)
        assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert str(config.dtype) == f"torch.{np.dtype(dtype).name}"
    assert config.architectures == ["BertModel"]
    loaded = BertModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == config.dtype
    tolerance = 0 if dtype == np.float32 else 1e-2
    torch.testing.assert_close(
        loaded.float().state_dict(), model.state_dict(), atol=tolerance, rtol=tolerance
    )


def test_shards_stay_below_their_size(tmp_path):
    tensors = {**small_tensors(), "large": np.ones(1000, np.float32), "last": np.ones(1)}
    with write_checkpoint(tmp_path / "out", max_shard_bytes=1000) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    # Two of 400 bytes each a shard; the large one, which is 4000 bytes, by itself.
    shards = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    assert sorted(os.listdir(tmp_path / "out")) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert index["weight_map"] == {
        "layer.0.weight": shards[0],
        "layer.1.weight": shards[0],
        "layer.2.weight": shards[1],
        "layer.3.weight": shards[1],
        "layer.4.weight": shards[2],
        "large": shards[3],
        "last": shards[4],
    }


def test_arrays_of_any_layout(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    with write_checkpoint(tmp_path / "out") as writer:
        writer.add("transposed", matrix.T)
        writer.add("scalar", jnp.float32(2.5))
        writer.add("half", jnp.ones((2, 2), jnp.bfloat16))
        writer.write_config(fields_of(BertConfig(**BERT)))
    checkpoint = Checkpoint.open(tmp_path / "out")
    np.testing.assert_array_equal(checkpoint.read("transposed"), matrix.T)
    assert checkpoint.tensors["scalar"].shape == ()
    assert checkpoint.tensors["half"].dtype == ml_dtypes.bfloat16


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with write_checkpoint(tmp_path / "out") as writer:
        writer.add("a", np.ones(2, np.float32))
    written = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(written) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_config_has_the_dtype_of_most_values_and_the_callers_is_untouched(tmp_path):
    config = fields_of(CLIPConfig())
    config["dtype"] = config["vision_config"]["dtype"] = "float32"
    with write_checkpoint(tmp_path / "out") as writer:
        writer.add("weight", np.ones((4, 4), ml_dtypes.bfloat16))
        writer.add("logit_scale", np.ones((), np.float32))
        writer.write_config(config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["vision_config"]["dtype"] == "bfloat16"
    assert config["dtype"] == config["vision_config"]["dtype"] == "float32"


def test_assets_are_copied_from_links_too(tmp_path):
    expert(tmp_path / "base", seed=1, num_labels=2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ASSETS:
        (blobs / name).write_text(name)
        (tmp_path / "base" / name).unlink(missing_ok=True)
        (tmp_path / "base" / name).symlink_to(blobs / name)
    (tmp_path / "base" / "README.md").touch()
    with write_checkpoint(tmp_path / "out") as writer:
        writer.add("a", np.ones(2, np.float32))
        writer.copy_assets(Checkpoint.open(tmp_path / "base"))
    assert set(os.listdir(tmp_path / "out")) == {"model.safetensors", *ASSETS}
    for name in ASSETS:
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_text() == name


def test_assets_that_a_checkpoint_lacks(tmp_path):
    """Another's take their place, of each kind all from one; its own are kept."""
    for name in ("none", "processor", "both"):
        expert(tmp_path / name, seed=1, num_labels=2)
        (tmp_path / name / "tokenizer.json").unlink()
        if name != "none":
            (tmp_path / name / "preprocessor_config.json").write_text(f'{{"of": "{name}"}}')
    for file in ("tokenizer.json", "merges.txt", "generation_config.json"):
        (tmp_path / "both" / file).write_text('{"of": "both"}')
    none, processor, both = (Checkpoint.open(tmp_path / n) for n in ("none", "processor", "both"))
    with write_checkpoint(tmp_path / "out") as writer:
        writer.add("a", np.ones(2, np.float32))
        writer.copy_assets(none, [processor, both])
        head = {"b": np.ones(2, np.float32)}
        for task, own in {"processor": processor, "both": both}.items():
            writer.add_task_model(
                task, config=own.config_fields, head=head, assets=own, otherwise=[none, both]
            )

    def assets(folder: Path) -> dict[str, str]:
        return {
            file.name: file.read_text()
            for file in folder.iterdir()
            if file.is_file() and not file.name.startswith(("model", "config"))
        }

    tokenizer = dict.fromkeys(("tokenizer.json", "merges.txt"), '{"of": "both"}')
    of_processor = tokenizer | {"preprocessor_config.json": '{"of": "processor"}'}
    assert assets(tmp_path / "out") == of_processor
    assert assets(tmp_path / "out" / "tasks" / "processor") == of_processor
    assert assets(tmp_path / "out" / "tasks" / "both") == assets(tmp_path / "both")


def test_a_tensor_cannot_be_added_twice(tmp_path):
    with (
        pytest.raises(ValueError, match="a was added twice"),
        write_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add("a", np.ones(2, np.float32))
        writer.add("a", np.ones(2, np.float32))
    assert os.listdir(tmp_path) == []


# Task models


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 8_000])
def test_task_models_of_text(tmp_path, max_shard_bytes):
    experts = {
        "trec": expert(tmp_path / "trec", seed=1, num_labels=6),
        "sst2": expert(tmp_path / "sst2", seed=2, num_labels=2),
    }
    base = Checkpoint.open(tmp_path / "trec")
    with write_checkpoint(tmp_path / "out", max_shard_bytes=max_shard_bytes) as writer:
        for name in base.tensors:
            if not name.startswith("classifier."):
                writer.add(name, base.read(name))
        writer.write_config(base.config_fields)
        for task in experts:
            checkpoint = Checkpoint.open(tmp_path / task)
            head = {
                f"classifier.{part}": checkpoint.read(f"classifier.{part}")
                for part in ("weight", "bias")
            }
            writer.add_task_model(
                task, config=checkpoint.config_fields, head=head, assets=checkpoint
            )
    tokens = torch.arange(12).reshape(2, 6)
    for task, model in experts.items():
        folder = tmp_path / "out" / "tasks" / task
        assert not (folder / "model.safetensors").exists()
        assert (folder / "tokenizer.json").read_text() == (
            tmp_path / task / "tokenizer.json"
        ).read_text()
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert loaded.config.num_labels == model.config.num_labels
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.eval()(tokens).logits, model(tokens).logits, atol=0, rtol=0
            )
        # Our own reader sees the same model.
        assert Checkpoint.open(folder).identity() == Checkpoint.open(tmp_path / task).identity()
    shared = list((tmp_path / "out").glob("model*.safetensors"))
    assert (len(shared) == 1) == (max_shard_bytes > 8_000)
    assert all(file.stat().st_nlink == 3 for file in shared)
    # The backbone itself is an ordinary checkpoint as well.
    _, info = BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_task_model_of_images(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "cars")
    cars = Checkpoint.open(tmp_path / "cars")
    with write_checkpoint(tmp_path / "out") as writer:
        head = {}
        for name in cars.tensors:
            if name.startswith("classifier."):
                head[name] = jnp.asarray(cars.read(name))
            else:
                writer.add(name, cars.read(name))
        writer.add_task_model("cars", config=cars.config_fields, head=head, assets=cars)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "tasks" / "cars")
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(pixels).logits, model(pixels).logits, atol=0, rtol=0
        )


def test_copies_where_hard_links_are_refused(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    expert(tmp_path / "trec", seed=1, num_labels=2)
    trec = Checkpoint.open(tmp_path / "trec")
    with caplog.at_level(logging.WARNING), write_checkpoint(tmp_path / "out") as writer:
        writer.add("a", np.ones((10, 10), np.float32))
        head = {"b": np.ones(2, np.float32)}
        writer.add_task_model("trec", config=trec.config_fields, head=head, assets=trec)
    assert "tasks/trec holds a copy of the shared weights (400 bytes)" in caplog.text
    assert Checkpoint.open(tmp_path / "out" / "tasks" / "trec").tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("task", ["", ".", "..", "a/b", "../a", "a\\b", "/a", ".hidden", "a\n"])
def test_task_names_are_folder_names(tmp_path, task):
    expert(tmp_path / "trec", seed=1, num_labels=2)
    trec = Checkpoint.open(tmp_path / "trec")
    with (
        pytest.raises(InputError, match=r"task name .* cannot be the name of a folder") as caught,
        write_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add_task_model(task, config=trec.config_fields, head={}, assets=trec)
    one_line(caught)
    assert os.listdir(tmp_path) == ["trec"]


def test_tasks_and_tensors_have_one_place(tmp_path):
    expert(tmp_path / "trec", seed=1, num_labels=2)
    trec = Checkpoint.open(tmp_path / "trec")
    head = {"a": np.ones(2, np.float32)}
    with (
        pytest.raises(InputError, match="two tasks named 'trec'"),
        write_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add_task_model("trec", config=trec.config_fields, head=head, assets=trec)
        writer.add_task_model("trec", config=trec.config_fields, head=head, assets=trec)
    with (
        pytest.raises(ValueError, match="a is both a shared tensor and in the head of 'trec'"),
        write_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add("a", np.ones(2, np.float32))
        writer.add_task_model("trec", config=trec.config_fields, head=head, assets=trec)
    assert os.listdir(tmp_path) == ["trec"]


# What can go wrong


def test_folder_in_use(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(InputError, match="out is not empty; choose another folder") as caught:
        write_checkpoint(tmp_path / "out").__enter__()
    one_line(caught)
    with pytest.raises(InputError, match="precious is a file") as caught:
        write_checkpoint(tmp_path / "out" / "precious").__enter__()
    one_line(caught)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "out").mkdir()
    for folder in (tmp_path / "out", tmp_path / "deep" / "er"):
        with write_checkpoint(folder) as writer:
            writer.add("a", np.ones(2, np.float32))
        assert os.listdir(folder) == ["model.safetensors"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cannot write to .*file/out .*; choose another"
    ) as caught:
        write_checkpoint(tmp_path / "file" / "out").__enter__()
    one_line(caught)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root writes everywhere
        with pytest.raises(InputError, match=r"cannot write to .*closed is not writable"):
            write_checkpoint(closed / "deep" / "out").__enter__()


def test_disk_too_small(tmp_path):
    expected = shutil.disk_usage(tmp_path).free + 10**12
    with pytest.raises(InputError, match=r"not enough space for .*out: .*GB will be wri") as caught:
        write_checkpoint(tmp_path / "out", expected_bytes=expected).__enter__()
    one_line(caught)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("on_exit", [False, True])
def test_disk_becomes_full(tmp_path, monkeypatch, error, on_exit):
    write = shards.write_tensors
    started = []

    def write_one(file, tensors, **arguments):
        started.append(file)
        if len(started) > 1:
            raise error
        return write(file, tensors, **arguments)

    monkeypatch.setattr(shards, "write_tensors", write_one)
    message = r"no space left while writing .*out: 512 bytes were written .* were free;"
    with (
        pytest.raises(InputError, match=message) as caught,
        write_checkpoint(tmp_path / "out", max_shard_bytes=600) as writer,
    ):
        for name, array in list(small_tensors().items())[: 2 if on_exit else 5]:
            writer.add(name, array)
    one_line(caught)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_export_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(error),
        write_checkpoint(tmp_path / "out", max_shard_bytes=500) as writer,
    ):
        for name, array in small_tensors().items():
            writer.add(name, array)
        assert len(os.listdir(tmp_path)) == 1
        raise error
    assert os.listdir(tmp_path) == []


def test_interrupt_while_finishing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_export, "write_index", interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        write_checkpoint(tmp_path / "out", max_shard_bytes=500) as writer,
    ):
        for name, array in small_tensors().items():
            writer.add(name, array)
    assert os.listdir(tmp_path) == []


def test_of_several_classes_the_first_is_loaded():
    """An adapter that classifies, beside a base without a head, is exported as it."""
    model = model_class(DeiTConfig(), "AutoModelForImageClassification")
    assert model == "DeiTForImageClassification"
