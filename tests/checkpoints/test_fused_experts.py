"""Stacked experts are read one by one, under the names that `transformers` has for them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from adamerge_jax.checkpoints.fused_experts import LAYOUTS, with_experts_apart
from adamerge_jax.checkpoints.safetensors_file import (
    TensorInfo,
    open_weights,
    read_entries,
    read_header,
)

EXPERTS, WIDTH, BETWEEN = 3, 4, 5
STACKS = {
    "gate_up_proj": (EXPERTS, 2 * BETWEEN, WIDTH),
    "down_proj": (EXPERTS, WIDTH, BETWEEN),
}


def read(info: TensorInfo) -> np.ndarray:
    values = np.empty(info.shape, info.dtype)
    with open_weights(info.file) as stream:
        read_entries(stream, "", info, 0, values.reshape(-1))
    return values


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_transformers_makes_the_same_stacks_of_them(model_type: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    module = "feed_forward" if model_type in ("jamba", "lfm2_moe") else "mlp"
    router = f"model.layers.1.{module}.{'router' if model_type == 'phimoe' else 'gate'}.weight"
    names = {f"model.layers.1.{module}.experts.{kind}": STACKS[kind] for kind in STACKS}
    arrays = {
        name: generator.normal(size=shape).astype(np.float16)
        for name, shape in {**names, router: (EXPERTS, WIDTH), "lm_head.weight": (9, 4)}.items()
    }
    save_file(arrays, tmp_path / "model.safetensors")
    tensors, stacks = with_experts_apart(model_type, read_header(tmp_path / "model.safetensors"))
    assert stacks == 2 and len(tensors) == 3 * EXPERTS + 2
    mapping = get_checkpoint_conversion_mapping(model_type)
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    renamings = [change for change in mapping if change not in converters]
    parts: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for name, info in tensors.items():
        parts.setdefault(rename_source_key(name, renamings, converters), []).append(read(info))
    for (name, pattern), values in parts.items():
        if pattern is None:
            np.testing.assert_array_equal(values[0], arrays[name])
    for name in names:
        patterns = next(c for c in converters if c.target_patterns[0] in name).source_patterns
        stack = np.concatenate([np.stack(parts[name, pattern]) for pattern in patterns], axis=1)
        np.testing.assert_array_equal(stack, arrays[name])


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("qwen3_moe", (3, 5, 4)),  # two halves of no length
        ("qwen3_moe", (10, 4)),
        ("qwen3_moe", (2**40, 2, 0)),
        ("qwen3_moe", (5000, 2, 1)),
        ("gpt_oss", (3, 10, 4)),  # halves lie otherwise
    ],
)
def test_what_is_no_stack_stays(model_type: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    info = TensorInfo(shape, np.dtype(np.float32), tmp_path, 8)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": info}
    assert with_experts_apart(model_type, tensors) == (tensors, 0)
