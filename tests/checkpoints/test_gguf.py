"""Models in GGUF files, compared with what `transformers` reads from the same files."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from adamerge_jax.checkpoints.gguf_file import read_gguf
from adamerge_jax.checkpoints.gguf_model import GgufCheckpoint, open_gguf
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.opening import open_checkpoint
from adamerge_jax.errors import InputError

references = pytest.importorskip("tests.gguf_references")

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    max_position_embeddings=128,
)

CONFIGS = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**{n: v for n, v in SIZES.items() if n != "head_dim"}),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen3moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "phi3": Phi3Config(
        **{n: v for n, v in SIZES.items() if n != "head_dim"}, pad_token_id=0, eos_token_id=1
    ),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16),
}


def made(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[architecture]
    config.head_dim = getattr(config, "head_dim", None) or 16
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Returns the folder of a file of each architecture, each in its own folder."""
    folder = tmp_path_factory.mktemp("gguf")
    for architecture in CONFIGS:
        (folder / architecture).mkdir()
        references.write_gguf(made(architecture), folder / architecture / "m.gguf", architecture)
    return folder


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tensors_are_those_that_transformers_reads(files, architecture):
    folder = files / architecture
    # It does not read all that these files say of heads and experts.
    config = None if architecture == "llama" else CONFIGS[architecture]
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="m.gguf", config=config, dtype=torch.float32
    )
    expected = dict(references.one_by_one(model))
    checkpoint = open_checkpoint(str(folder / "m.gguf"))
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        read = checkpoint.read(name)
        np.testing.assert_allclose(read, array, rtol=0, atol=1e-6, err_msg=name)
        size = read.size
        for first, count in ((0, 1), (size // 3, size // 3), (size - 1, 1)):
            part = np.empty(count, np.float32)
            checkpoint.read_part(name, first, part)
            assert np.array_equal(part, read.reshape(-1)[first : first + count])
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert getattr(checkpoint.config, name) == getattr(model.config, name)
    assert bool(checkpoint.lacks) == (architecture in ("qwen3moe", "phi3", "gemma2", "gemma3"))
    assert "(F32, Q8_0) are restored" in checkpoint.notes[0]
    assert checkpoint.identity() == open_checkpoint(str(folder / "m.gguf")).identity()


def test_values_are_those_of_the_model(files):
    state = made("llama").state_dict()
    checkpoint = open_gguf("m", files / "llama" / "m.gguf")
    assert checkpoint.config_fields["rms_norm_eps"] == 1e-5
    for name, tensor in state.items():
        step = np.abs(tensor.numpy()).max() / 127
        np.testing.assert_allclose(checkpoint.read(name), tensor.numpy(), rtol=0, atol=step)


def refused(file: Path, *messages: str) -> None:
    with pytest.raises(InputError) as caught:
        open_gguf(str(file), file)
    for message in (str(file), *messages):
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds(files, tmp_path):
    model, llama = made("qwen2"), made("llama")
    file = tmp_path / "m.gguf"
    references.write_gguf(model, file, "qwen2", fields={"general.type": "adapter"})
    refused(file, "no model but a part of one", "adapter")
    references.write_gguf(model, file, "qwen2", fields={"split.count": 3})
    refused(file, "one of 3 files", "llama-gguf-split")
    strange = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    references.write_gguf(model, file, "qwen2", further=strange)
    refused(file, "blk.0.attn_sinks.weight, which is no tensor of the architecture qwen2")
    for module in ("attn_q", "attn_k", "attn_v", "ffn_up"):  # as of attention_bias and mlp_bias
        bias = {f"blk.0.{module}.bias": np.ones(64, np.float32)}
        references.write_gguf(llama, file, "llama", further=bias)
        refused(file, f"blk.0.{module}.bias, which is no tensor of the architecture llama")
    for shape in ((64,), (64, 2, 32)):
        query = {"blk.2.attn_q.weight": np.ones(shape, np.float32)}
        references.write_gguf(llama, file, "llama", further=query)
        refused(file, f"attn_q.weight of shape {shape}, expected a matrix")
    for shape in ((5000, 1, 32), (4, 32)):
        stack = {"blk.2.ffn_up_exps.weight": np.ones(shape, np.float32)}
        references.write_gguf(made("qwen3moe"), file, "qwen3moe", further=stack)
        refused(file, f"model.layers.2.mlp.experts of shape {shape}", "4096 experts at most")
    references.write_gguf(llama, file, "llama", fields={"llama.expert_count": 8})
    refused(file, "'llama with experts'", "qwen3moe")
    references.write_gguf(model, file, "qwen2")
    file.write_bytes(file.read_bytes().replace(b"qwen2", b"bloom"))
    refused(file, "architecture 'bloom'", "give the model in safetensors")
    references.write_gguf(
        llama, file, "llama", further={"rope_freqs.weight": np.ones(8, np.float32)}
    )
    assert open_gguf("m", file).lacks == "how its rotary positions are scaled"
    with pytest.raises(InputError, match="is a file; give the folder"):
        locate(tmp_path / "m.gguf", revision="v1")


def test_damaged_files(files, tmp_path):
    whole = (files / "llama" / "m.gguf").read_bytes()
    file = tmp_path / "m.gguf"

    def damaged(data: bytes, *messages: str) -> None:
        file.write_bytes(data)
        refused(file, *messages)

    damaged(b"", "cannot be read")
    damaged(b"GGUF", "ends within its header")
    damaged(b"PK" + whole[2:], "does not begin with GGUF")
    damaged(whole[:4] + struct.pack(">I", 3) + whole[8:], "of GGUF version 50331648")
    for count in (2**63, 2**40, len(whole)):
        counts = struct.pack("<QQ", count, 1)
        damaged(whole[:8] + counts + whole[24:], f"it has {count} tensors")
        counts = struct.pack("<QQ", 1, count)
        damaged(whole[:8] + counts + whole[24:], f"it has {count} fields")
    damaged(whole[:24] + struct.pack("<Q", 2**62) + whole[32:], "ends within its header")
    damaged(whole[:-1000], "ends at byte", f"the file has {len(whole) - 1000}")
    # A list that claims more than there is, and the type of a field that is none.
    at = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    damaged(whole[: at + 8] + struct.pack("<Q", 2**60) + whole[at + 16 :], f"it has {2**60} tok")
    damaged(whole[:at] + struct.pack("<I", 99) + whole[at + 4 :], "of type 99")
    damaged(whole[: at + 4] + struct.pack("<I", 9) + whole[at + 8 :], "a list of type 9")
    at = whole.index(b"llama.attention.head_count") + len("llama.attention.head_count") + 4
    damaged(whole[:at] + struct.pack("<I", 0) + whole[at + 4 :], "of 0 heads")
    damaged(whole[:at] + struct.pack("<I", 7) + whole[at + 4 :], "of 7 heads")
    at = whole.index(b"llama.block_count") + len("llama.block_count") + 4
    damaged(whole[:at] + struct.pack("<I", 10**9) + whole[at + 4 :], "num_hidden_layers")
    at = whole.index(b"token_embd.weight") + len("token_embd.weight")
    damaged(whole[:at] + struct.pack("<I", 9) + whole[at + 4 :], "token_embd.weight with 9 axes")
    damaged(whole[: at + 4] + struct.pack("<Q", 63) + whole[at + 12 :], "a multiple of 32")
    damaged(whole[: at + 4] + struct.pack("<Q", 0) + whole[at + 12 :], "has shape (64, 0)")
    damaged(
        whole[: at + 12] + struct.pack("<Q", 128) + whole[at + 20 :], "has tensors of", "behind"
    )
    damaged(whole[: at + 20] + struct.pack("<I", 77) + whole[at + 24 :], "stored in type 77")
    damaged(whole[: at + 24] + struct.pack("<Q", 2**60) + whole[at + 32 :], "ends at byte")


def test_long_lists_are_counted_only(files):
    fields = read_gguf(files / "llama" / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"] == 64
