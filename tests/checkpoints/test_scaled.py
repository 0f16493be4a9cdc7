"""Weights stored as 8-bit numbers with scales, compared with PyTorch in float64."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError

DOWN = "model.layers.0.mlp.down_proj.weight"  # [32, 300]: no whole number of blocks

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Returns the folder of a tiny Llama in bfloat16."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=300, num_hidden_layers=1, vocab_size=40)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def expanded(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Repeats the scale of each block in float64."""
    rows, columns = (
        index // size for index, size in zip(np.indices(shape[-2:]), block, strict=True)
    )
    return scale.double()[..., rows, columns]


def quantised(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to 8-bit numbers with a scale a block."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scale = torch.rand(rows, columns) / 16 + 1e-3
    numbers = weight.double() / expanded(scale, block, weight.shape)
    return (numbers.round() if dtype == torch.int8 else numbers.float()).to(dtype), scale


def written(
    plain: Path, folder: Path, tensors: Tensors, settings: dict | None, drop: tuple[str, ...] = ()
) -> Path:
    """Writes the model with some tensors in place of its own."""
    from safetensors.torch import load_file

    config = json.loads((plain / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    of_model = load_file(plain / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in of_model.items() if name not in drop}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors"}
BLOCKS = {"config_groups": {"group_0": {"weights": {"block_structure": [16, 64]}}}}


@pytest.mark.parametrize(
    ("settings", "ending", "block", "scale_shape", "dtype"),
    [
        (FP8, "_scale_inv", (128, 128), None, torch.float8_e4m3fn),
        ({"quant_method": "fp8"}, "_scale_inv", (128, 128), None, torch.float8_e5m2),
        ({**FP8, "weight_block_size": [8, 64]}, "_scale_inv", (8, 64), None, torch.float8_e4m3fn),
        (COMPRESSED, "_scale", (32, 300), (1,), torch.float8_e4m3fn),
        (COMPRESSED, "_scale", (32, 300), (), torch.float8_e4m3fn),
        (COMPRESSED, "_scale", (1, 300), None, torch.float8_e4m3fn),
        (COMPRESSED, "_scale", (1, 300), (32,), torch.int8),
        (COMPRESSED, "_scale", (1, 30), None, torch.int8),
        (COMPRESSED | BLOCKS, "_scale", (16, 64), None, torch.float8_e4m3fn),
    ],
)
def test_numbers_times_scales(plain, tmp_path, settings, ending, block, scale_shape, dtype):
    weight = Checkpoint.open(plain).read(DOWN).astype(np.float32)
    numbers, scale = quantised(torch.from_numpy(weight), block, dtype)
    expected = (numbers.double() * expanded(scale, block, numbers.shape)).numpy()
    if scale_shape is not None:
        scale = scale.reshape(scale_shape)
    further = {"model.layers.0.mlp.down_proj.input_scale": torch.ones(1)}
    folder = written(
        plain, tmp_path / "q", {DOWN: numbers, DOWN + ending: scale, **further}, settings
    )
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == Checkpoint.open(plain).tensors.keys()
    read = checkpoint.read(DOWN)
    assert (read.dtype, read.shape) == (np.float32, (32, 300))
    np.testing.assert_allclose(read, expected, rtol=1e-6)
    assert checkpoint.tensors[DOWN].merged_dtype == ml_dtypes.bfloat16
    assert checkpoint.notes == (
        "1 tensors of 8-bit numbers with scales are restored while they are read",
    )
    for first, count in ((0, 1), (299, 2), (1234, 5000), (9599, 1)):
        part = np.empty(count, np.float32)
        checkpoint.read_part(DOWN, first, part)
        assert np.array_equal(part, read.reshape(-1)[first : first + count])
    # Other scales make another model.
    other = written(
        plain, tmp_path / "other", {DOWN: numbers, DOWN + ending: 2 * scale, **further}, settings
    )
    assert checkpoint.identity() != Checkpoint.open(other).identity()


def test_powers_of_two_as_scales(plain, tmp_path):
    numbers = torch.linspace(-4, 4, 9600).reshape(32, 300).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 0.25]]).to(torch.float8_e8m0fnu)
    folder = written(plain, tmp_path / "q", {DOWN: numbers, f"{DOWN}_scale_inv": scale}, FP8)
    expected = numbers.double() * expanded(scale.float(), (128, 128), numbers.shape)
    assert np.array_equal(Checkpoint.open(folder).read(DOWN), expected.numpy())


def test_stacked_experts_with_scales(tmp_path):
    experts, hidden, width = 3, 24, 40
    config = {
        "model_type": "qwen3_moe",
        "quantization_config": {**FP8, "weight_block_size": [8, 16]},
    }
    stack = torch.randn(experts, 2 * width, hidden).to(torch.float8_e4m3fn)
    scale = torch.rand(experts, 10, 2) + 0.1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({name: stack, f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    expected = (stack.double() * expanded(scale, (8, 16), stack.shape)).numpy()
    for expert in range(experts):
        halves = expected[expert][:width], expected[expert][width:]
        for module, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            part = f"model.layers.0.mlp.experts.{expert}.{module}.weight"
            np.testing.assert_allclose(checkpoint.read(part), half, rtol=1e-6)
    assert checkpoint.identity().startswith("sha256:")


def test_scales_that_are_refused(plain, tmp_path):
    numbers = torch.ones(32, 300).to(torch.float8_e4m3fn)

    def refused(*messages: str, read: bool = False, **arguments) -> None:
        settings = arguments.pop("settings", FP8)
        tensors = {DOWN: numbers, **{DOWN + end: value for end, value in arguments.items()}}
        folder = written(plain, tmp_path / "q", tensors, settings)
        with pytest.raises(InputError) as caught:
            checkpoint = Checkpoint.open(folder)
            if read:
                checkpoint.read(DOWN)
        for message in (DOWN, *messages):
            assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    ones = torch.ones
    refused("stored as float8_e4m3fn without a scale")
    refused("scale_inv has shape (1, 2)", "each block of 128 x 128", _scale_inv=ones(1, 2))
    refused("scale_inv has shape (2, 3)", _scale_inv=ones(2, 3))
    refused("scale_inv has shape (1, 1)", _scale_inv=ones(1, 1))
    refused("scale_inv has shape (0, 3)", _scale_inv=ones(0, 3))
    refused("scale has shape (31, 1)", settings=COMPRESSED, _scale=ones(31, 1))
    refused("scale has shape (32, 7)", settings=COMPRESSED, _scale=ones(32, 7))
    refused("is stored as int32", _scale_inv=ones(1, 3, dtype=torch.int32))
    refused("zero point", settings=COMPRESSED, _scale=ones(1), _zero_point=numbers[:, :1].clone())
    columns = torch.arange(300, dtype=torch.int32) % 10
    refused("order of its groups", settings=COMPRESSED, _scale=ones(32, 10), _g_idx=columns)
    for value in (float("nan"), float("inf")):
        bad = torch.tensor([[1, value, 1]])
        refused(f"_scale_inv holds {value}", read=True, _scale_inv=bad)
    for block in ([0, 128], [128], "128", [1.5, 2], [True, 128]):
        with pytest.raises(InputError, match="the block of its quantization_config is"):
            settings = {**FP8, "weight_block_size": block}
            tensors = {DOWN: numbers, f"{DOWN}_scale_inv": ones(1, 3)}
            Checkpoint.open(written(plain, tmp_path / "q", tensors, settings))
