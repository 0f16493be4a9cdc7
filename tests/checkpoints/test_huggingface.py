import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file
from transformers import BertConfig, BertForSequenceClassification

from adamerge_jax.checkpoints.fingerprint import fingerprint_of_arrays
from adamerge_jax.checkpoints.finite import require_finite
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError

TINY = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=20,
    num_labels=3,
)


def save_bert(folder: Path, *, seed: int = 0, dtype=torch.float32, max_shard_size="5GB"):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**TINY)).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def refused(match: str, source, **arguments) -> None:
    """Opening raises an InputError of one line that says `match`."""
    with pytest.raises(InputError, match=match) as caught:
        Checkpoint.open(source, **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_bert(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_reads_what_transformers_saved(tmp_path, dtype, max_shard_size):
    model = save_bert(tmp_path / "model", dtype=dtype, max_shard_size=max_shard_size)
    checkpoint = Checkpoint.open(tmp_path / "model")
    state = model.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    assert checkpoint.config.model_type == "bert"
    assert checkpoint.config.hidden_size == 16
    for name, tensor in state.items():
        array = checkpoint.read(name)
        assert array.dtype == checkpoint.tensors[name].dtype
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        assert array.shape == checkpoint.tensors[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_integer_buffers_and_scalars_are_listed(tmp_path):
    save_bert(tmp_path / "model")
    tensors = {
        "position_ids": np.arange(4)[None],
        "logit_scale": np.asarray(2.5, np.float32),
        "half": np.ones(3, ml_dtypes.bfloat16),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.tensors["position_ids"].dtype == np.int64
    assert checkpoint.tensors["half"].dtype == ml_dtypes.bfloat16
    assert checkpoint.tensors["logit_scale"].shape == ()
    assert checkpoint.read("logit_scale") == 2.5
    assert checkpoint.identity().startswith("sha256:")


def test_identity_is_of_the_weights_and_not_of_the_files(tmp_path):
    save_bert(tmp_path / "one")
    save_bert(tmp_path / "shards", max_shard_size="8KB")
    save_bert(tmp_path / "other", seed=1)
    save_bert(tmp_path / "half", dtype=torch.bfloat16)
    identities = {
        name: Checkpoint.open(tmp_path / name).identity()
        for name in ("one", "shards", "other", "half")
    }
    assert identities["one"] == identities["shards"]
    assert len(set(identities.values())) == 3
    assert re.fullmatch("sha256:[0-9a-f]{64}", identities["one"])


def test_identity_sees_the_end_of_every_tensor(tmp_path):
    save_bert(tmp_path / "model")
    tensors = {"a": np.zeros((4, 500), np.float32), "b": np.zeros((0, 3), np.float32)}
    identities = set()
    for last in (0, 1):
        tensors["a"][-1, -1] = last
        save_file(tensors, tmp_path / "model" / "model.safetensors")
        identities.add(Checkpoint.open(tmp_path / "model").identity())
        assert fingerprint_of_arrays(tensors) in identities  # the same of arrays in memory
    assert len(identities) == 2
    # What lies between its samples is not read.
    tensors["a"][1:-1] = 7
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert Checkpoint.open(tmp_path / "model").identity() in identities


# Sources that are no checkpoint


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", ""])
def test_missing_folder(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub")
    )
    if source:
        refused(f"no such folder: {source}", source)
    refused("no such folder", tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    refused("is a file; give the folder", str(file))


def test_revision_of_a_local_folder(sharded):
    refused("local folder, so it has no revision 'main'", sharded, revision="main")


def test_folder_without_config(sharded):
    (sharded / "config.json").unlink()
    refused("has no config.json", sharded)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "config.json is not JSON"),
        ('{"model_type": "perceptron9000"}', "config.json.*`perceptron9000`"),
        ('{"model_type": "bert", "hidden_size": "x"}', "config.json.*hidden_size"),
        ("{}", "config.json.*model_type"),
    ],
)
def test_broken_config(sharded, content, match):
    (sharded / "config.json").write_text(content)
    refused(match, sharded)


def test_folder_without_weights(sharded):
    for file in sharded.glob("model*"):
        file.unlink()
    (sharded / "training_args.bin").touch()
    refused("has no safetensors weights: neither model.safetensors nor", sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "adapter.bin", "epoch3.ckpt"])
def test_pickled_weights_are_not_opened(sharded, name):
    for file in sharded.glob("model*"):
        file.unlink()
    (sharded / "training_args.bin").touch()
    (sharded / name).write_bytes(b"would run")
    refused(rf"only pickled weights \({name}\).*save_pretrained", sharded)


# Broken weight files


def test_truncated_shard(sharded):
    shard = sharded / "model-00002-of-00004.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    refused(
        f"{shard} has {len(content) - 10} bytes where its header describes {len(content)}", sharded
    )


@pytest.mark.parametrize("length", [0, 5, 100])
def test_shard_cut_off_in_its_header(sharded, length):
    shard = sharded / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    refused(f"{shard} has {length} bytes and ends within its header", sharded)


def test_corrupt_header(sharded):
    shard = sharded / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:20] = b"x" * 12
    shard.write_bytes(content)
    refused(f"{shard} is corrupt", sharded)


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "is corrupt"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "is corrupt"),
        (b'{"a\\nb":' + ENTRY + b"}", r"a tensor called 'a\\nb' \(3 characters\)"),
        (b'{"\\u001b[31m":' + ENTRY + b"}", "a tensor called"),
        (b'{"":' + ENTRY + b"}", r"a tensor called '' \(0 characters\)"),
        (b'{"' + b"x" * 2000 + b'":' + ENTRY + b"}", r"\(2000 characters\)"),
        (b'{"a":' + ENTRY.replace(b"[1]", b"[" + b"1," * 39 + b"1]") + b"}", "a with 40 axes"),
        (b'{"a":' + ENTRY.replace(b"[1]", b"[0,%d]" % 2**62) + b"}", "corrupt|axes of up to"),
        (b"[" * 100, "is corrupt"),
    ],
)
def test_headers_of_strangers(sharded, header, message):
    shard = sharded / "model-00001-of-00004.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(message, sharded)


def test_a_header_that_is_longer_than_any(sharded):
    shard = sharded / "model-00001-of-00004.safetensors"
    with shard.open("wb") as file:
        file.write((2 * 10**8).to_bytes(8, "little"))
        file.truncate(3 * 10**8)  # without values: it takes no room on the disk
    refused("says that its header has 200000000 bytes", sharded)


def test_git_lfs_pointer(sharded):
    shard = sharded / "model-00001-of-00004.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(f"{shard} is a Git LFS pointer.*git lfs pull", sharded)


def test_unreadable_weights_file(sharded):
    shutil.rmtree(sharded)
    save_bert(sharded)
    (sharded / "model.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    refused("model.safetensors is corrupt", sharded)


# Broken indices


def edit_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("content", ["{", "\x00", '{"weight_map": '])
def test_index_that_is_not_json(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused("index.json is not JSON", sharded)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_without_weight_map(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused("index.json (has no weight_map|holds no fields)", sharded)


def test_missing_shard(sharded):
    (sharded / "model-00003-of-00004.safetensors").unlink()
    refused("index.json names 'model-00003-of-00004.safetensors', which is missing", sharded)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b", "\ud800"])
def test_index_with_a_name_of_no_file(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"classifier.bias": name}))
    refused("which is missing; copy or download", sharded)


def test_index_that_is_nested_deep(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000)
    refused("index.json is not JSON", sharded)


@pytest.mark.parametrize("outside", ["../other.safetensors", "sub/../../x", "..", "a\\..\\b"])
def test_index_that_leaves_the_folder(sharded, outside):
    edit_index(sharded, lambda weight_map: weight_map.update({"classifier.bias": outside}))
    refused("not a file in its own folder", sharded)


def test_index_with_an_absolute_path(sharded, tmp_path):
    shutil.copy(sharded / "model-00001-of-00004.safetensors", tmp_path / "x.safetensors")
    absolute = str(tmp_path / "x.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"classifier.bias": absolute}))
    refused("', which is not a file in its own folder", sharded)


def test_index_names_a_tensor_that_the_shard_lacks(sharded):
    shard = "model-00001-of-00004.safetensors"
    edit_index(sharded, lambda weight_map: weight_map.update({"nothing": shard, "more": shard}))
    refused(rf"{shard} lacks nothing, which .* says it holds \(and 1 more\)", sharded)


# The Hub


def test_opens_the_hub_cache_offline(tmp_path, monkeypatch):
    save_bert(tmp_path / "model", max_shard_size="8KB")
    cache = tmp_path / "cache"
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = Checkpoint.open("org/name")
    assert checkpoint.source == "org/name"
    assert checkpoint.folder == snapshot
    assert checkpoint.identity() == Checkpoint.open(tmp_path / "model").identity()
    refused("org/other is neither.*nor in the Hub's cache.*HF_HUB_OFFLINE is set", "org/other")
    refused("org/name at revision 'v2' is neither.*HF_HUB_OFFLINE", "org/name", revision="v2")


# What the Hub's errors keep of a response, whichever transport library it came through.
RESPONSE = SimpleNamespace(headers={}, request=None)


class TransportError(Exception):
    """Stands for the errors of the transport library, which are no OSError."""


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError("a\nb", response=RESPONSE), "org/name is gated.*HF_TOKEN"),
        (RepositoryNotFoundError("a\nb", response=RESPONSE), "neither a local folder nor a chec"),
        (RevisionNotFoundError("a\nb", response=RESPONSE), "org/name .*no revision 'v2'"),
        (LocalEntryNotFoundError("a\nb"), "org/name at revision 'v2'.*unreachable"),
        (TransportError("slow\nline"), "cannot download org/name at revision 'v2'.*slow line"),
        (OSError(28, "No space left on device"), "cannot download org/name .*No space left"),
    ],
)
def test_what_the_hub_refuses(error, match, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused(match, "org/name", revision="v2")


def test_the_files_that_are_downloaded(tmp_path, monkeypatch):
    """Weights once, all files of a tokenizer, and nothing that could run or be unpickled."""
    of_repository = {
        "config.json": True,
        "model-00001-of-00002.safetensors": True,
        "bpe.codes": True,
        "source.spm": True,
        "chat_template.jinja": True,
        "additional_chat_templates/rag.jinja": True,
        "onnx/config.json": False,
        "adapter/adapter_model.safetensors": False,
        "assets/vocab.json": False,
        "pytorch_model.bin": False,
        "modeling.py": False,
        "additional_chat_templates/run.py": False,
    }

    chosen = files_downloaded(of_repository, tmp_path, monkeypatch)
    assert chosen == {name for name, wanted in of_repository.items() if wanted}


def test_the_files_of_a_pipeline_that_are_downloaded(tmp_path, monkeypatch):
    """Weights of components once, in the usual dtype where there is one, and none of the root."""
    of_repository = {
        "model_index.json": True,
        "sd_xl_base_1.0.safetensors": False,
        "unet/config.json": True,
        "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model.fp16.safetensors": False,
        "unet/diffusion_pytorch_model.bin": False,
        "vae/config.json": True,
        "vae/diffusion_pytorch_model.fp16.safetensors": True,
        "tokenizer/vocab.json": True,
        "tokenizer/run.py": False,
        "extra/config.json": False,
    }
    index = {"unet": ["d", "U"], "vae": ["d", "V"], "tokenizer": ["t", "T"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    chosen = files_downloaded(of_repository, tmp_path, monkeypatch)
    assert chosen == {name for name, wanted in of_repository.items() if wanted}


def files_downloaded(of_repository, folder, monkeypatch) -> set[str]:
    """Downloads a repository of the given files and returns those that were."""
    downloaded = set()

    def download(*_, allow_patterns, ignore_patterns, **__):
        chosen = set(
            filter_repo_objects(
                of_repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        assert not downloaded & {name for name in chosen if name.endswith(".safetensors")}
        downloaded.update(chosen)
        for name in chosen - {"model_index.json"}:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).touch()
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("org/name") == folder
    return downloaded


# Values


def test_finite_tensors_pass(sharded):
    checkpoint = Checkpoint.open(sharded)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        require_finite(np.ones((2, 3), dtype), tensor="t", source=checkpoint.source, role="base")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_non_finite_tensors_do_not(sharded, dtype):
    checkpoint = Checkpoint.open(sharded)
    array = np.ones((2, 3), dtype)
    array[0, 2] = np.nan
    array[1, 0] = -np.inf
    array[1, 2] = np.inf
    expected = re.escape(
        f"expert 'trec' ({sharded}): classifier.weight holds 1 NaN and 2 Inf among its 6 values, "
        "the first at [0, 2]"
    )
    with pytest.raises(InputError, match=expected) as caught:
        require_finite(
            array, tensor="classifier.weight", source=checkpoint.source, role="expert 'trec'"
        )
    assert "\n" not in str(caught.value)
