"""Merging and folding of quantised checkpoints, which are restored while they are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.cli import main as cli
from tests.references import merge_by_task_arithmetic, require_sum, write_recipe

gguf_references = pytest.importorskip("tests.gguf_references")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, dict[str, Tensors]]:
    """Returns a folder with a base and two experts in bfloat16, and their tensors."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    folder = tmp_path_factory.mktemp("models")
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name in ("base", "code", "law"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16))
    tensors = {n: load_file(folder / n / "model.safetensors") for n in ("base", "code", "law")}
    return folder, tensors


def quantise(source: Path, folder: Path, *, drop: str = "") -> Tensors:
    """Writes a model as DeepSeek-V3's files are, and returns what the numbers stand for."""
    stored, exact = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        exact[name] = weight.double()
        stored[name] = weight
        if weight.ndim < 2 or "proj" not in name:
            continue
        rows, columns = (-(-size // 16) for size in weight.shape)
        scale = torch.rand(rows, columns) / 64 + 1e-4
        wide = scale.double().repeat_interleave(16, 0).repeat_interleave(16, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        stored[name] = (weight.double() / wide).float().to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        exact[name] = stored[name].double() * wide
    stored.pop(drop, None)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def merged(folder: Path, models: dict[str, Path]) -> tuple[Path, Tensors, Tensors]:
    """Merges by task arithmetic, and folds its file in float32.

    Returns:
        The folder of the merge, its tensors, and those in float32.
    """
    tasks = {task: {"expert": str(models[task])} for task in models if task != "base"}
    fields = {"base": str(models["base"]), "tasks": tasks, "export": {"orbax": False}}
    recipe, out = write_recipe(folder, fields), folder / "out"
    checkpoint = merge_by_task_arithmetic(recipe, out)
    coefficients, again = out / "coefficients.safetensors", ["--out", str(folder / "again")]
    cli.main(["fold", str(recipe), str(coefficients), *again, "--export.dtype", "float32"])
    in_float32 = load_file(folder / "again" / "checkpoint" / "model.safetensors")
    return checkpoint, load_file(checkpoint / "model.safetensors"), in_float32


def require_sums(
    result: Tensors, base: Tensors, *experts: Tensors, rounding: float = 2**-8
) -> None:
    assert result.keys() == base.keys()
    for name, tensor in result.items():
        tensors = [expert[name] for expert in experts]
        require_sum(tensor, base[name], tensors, rtol=rounding, atol=1e-7, name=name)


@pytest.mark.parametrize("quantised", ["base", "law"])
def test_numbers_with_scales(models, tmp_path, quantised, capsys):
    folder, tensors = models
    exact = tensors | {quantised: quantise(folder / quantised, tmp_path / quantised)}
    sources = {name: folder / name for name in tensors} | {quantised: tmp_path / quantised}
    checkpoint, result, in_float32 = merged(tmp_path, sources)
    require_sums(result, *exact.values())
    require_sums(in_float32, *exact.values(), rounding=1e-6)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    config = json.loads((checkpoint / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    role = "base" if quantised == "base" else "expert 'law'"
    note = f"{role}: 14 tensors of 8-bit numbers with scales are restored while they are read"
    assert note in capsys.readouterr().out
    assert note in (checkpoint / "README.md").read_text().replace("&#39;", "'")
    loaded = LlamaForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.items())


def test_numbers_without_scales_are_refused(models, tmp_path, capsys):
    folder, _ = models
    lacking = "model.layers.1.mlp.up_proj.weight_scale_inv"
    quantise(folder / "law", tmp_path / "law", drop=lacking)
    with pytest.raises(SystemExit) as caught:
        merged(tmp_path, {"base": folder / "base", "law": tmp_path / "law"})
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "expert 'law'" in error
    assert f"without a scale ({lacking} or" in error
    assert not (tmp_path / "out").exists()


def dequantised(model: LlamaForCausalLM, file: Path) -> Tensors:
    """Writes a model as a GGUF file, and returns what `transformers` reads from it."""
    gguf_references.write_gguf(model, file, "llama")
    loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    return dict(loaded.state_dict())


def test_gguf_files(models, tmp_path, capsys):
    folder, tensors = models
    law = LlamaForCausalLM.from_pretrained(folder / "law")
    exact = tensors | {"law": dequantised(law, tmp_path / "law.gguf")}
    sources = {name: folder / name for name in tensors} | {"law": tmp_path / "law.gguf"}
    (tmp_path / "1").mkdir()
    _, result, in_float32 = merged(tmp_path / "1", sources)
    require_sums(result, *exact.values())
    require_sums(in_float32, *exact.values(), rounding=1e-6)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert "expert 'law': 21 tensors of a GGUF file (F32, Q8_0)" in capsys.readouterr().out

    # The base too; its config is made of the file's fields.
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    exact["base"] = dequantised(base, tmp_path / "base.gguf")
    (tmp_path / "2").mkdir()
    checkpoint, result, in_float32 = merged(
        tmp_path / "2", sources | {"base": tmp_path / "base.gguf"}
    )
    require_sums(in_float32, *exact.values(), rounding=1e-6)
    config, of_base = (
        json.loads((at / "config.json").read_text()) for at in (checkpoint, folder / "base")
    )
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert config[name] == of_base[name]
    loaded = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(
        loaded.state_dict()["lm_head.weight"], result["lm_head.weight"].to(torch.float32)
    )


def test_gguf_files_that_do_not_fit(models, tmp_path, capsys):
    folder, _ = models
    config = LlamaConfig.from_pretrained(folder / "base", num_hidden_layers=1)
    gguf_references.write_gguf(LlamaForCausalLM(config), tmp_path / "law.gguf", "llama")

    def refused(*messages: str, **sources: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            merged(tmp_path, sources)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for message in messages:
            assert message in error

    law = tmp_path / "law.gguf"
    refused("expert 'law'", "has num_hidden_layers 1 in its GGUF", base=folder / "base", law=law)
    further = {"rope_freqs.weight": np.ones(8, np.float32)}
    gguf_references.write_gguf(LlamaForCausalLM(config), law, "llama", further=further)
    refused("base: ", "how its rotary positions are scaled", base=law, law=folder / "law")
