"""Folding whole experts block by block, against the same sums over whole tensors in float64."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.safetensors_file import read_header
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline import blocks as folding
from adamerge_jax.pipeline.blocks import fold_tensor

NAME = "weight"


def saved(folder: Path, role: str, values: np.ndarray) -> MatchedCheckpoint:
    """A checkpoint of one tensor, opened."""
    file = folder / f"{role}.safetensors"
    save_file({"other": np.zeros(3, np.float32), NAME: values}, file)
    checkpoint = Checkpoint(role, folder, SimpleNamespace(), {}, read_header(file))
    return MatchedCheckpoint(checkpoint, role, {NAME: NAME}, ())


def fold(base: MatchedCheckpoint, experts: list[MatchedCheckpoint], scale: np.ndarray):
    with ThreadPoolExecutor(3) as threads:
        return fold_tensor(NAME, base, experts, scale, threads)


@pytest.mark.parametrize("block", [1, 7, 64, 2**17])
@pytest.mark.parametrize(
    "shape, scales",
    [
        ((), [(1,)]),
        ((9,), [(1,), (9,)]),
        ((6, 10), [(1, 1), (6, 1), (1, 10), (6, 10)]),
        ((4, 3, 5), [(1, 1, 1), (4, 1, 1), (1, 3, 1), (1, 1, 5)]),
        ((0, 4), [(1, 1)]),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_sum_is_rounded_once(tmp_path, monkeypatch, block, shape, scales, dtype):
    monkeypatch.setattr(folding, "_BLOCK_ENTRIES", block)
    generator = np.random.default_rng(0)
    base, *experts = (generator.normal(size=shape).astype(dtype) for _ in range(4))
    # Experts may be stored in another dtype than the base.
    experts[0] = experts[0].astype(np.float32)
    opened = [saved(tmp_path, f"model {k}", each) for k, each in enumerate([base, *experts])]
    for axes in scales:
        scale = generator.normal(size=(3, *(axes if shape else ()))).astype(np.float32)
        if not shape:
            scale = scale.reshape(3)
        merged = fold(opened[0], opened[1:], scale)
        exact = base.astype(np.float64)
        for own, expert in zip(scale, experts, strict=True):
            exact = exact + own * (expert.astype(np.float64) - base.astype(np.float64))
        assert merged.dtype == dtype
        assert merged.shape == shape
        # Half a unit in the last place, and what float32 sums may push over the middle.
        tolerance = float(ml_dtypes.finfo(dtype).eps) * (1 if dtype != np.float32 else 8)
        np.testing.assert_allclose(
            merged.astype(np.float64), exact, rtol=tolerance, atol=4e-6 if shape else 1e-6
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("model", ["base", "expert"])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_what_is_not_finite_is_refused(tmp_path, monkeypatch, value, model, scale):
    monkeypatch.setattr(folding, "_BLOCK_ENTRIES", 8)
    arrays = {role: np.ones((4, 6), ml_dtypes.bfloat16) for role in ("base", "expert")}
    arrays[model][2, 3] = value
    opened = [saved(tmp_path, role, array) for role, array in arrays.items()]
    with pytest.raises(InputError, match=rf"{model} .*: weight holds 1 .* the first at \[2, 3\]"):
        fold(opened[0], opened[1:], np.full((1, 1, 1), scale, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_of_finite_values_that_overflow(tmp_path, dtype):
    large = np.finfo(dtype).max
    opened = [
        saved(tmp_path, role, np.full(3, sign * large, dtype))
        for role, sign in (("base", 1), ("expert", -1))
    ]
    expected = f"the merge of weight has values that are more than {np.dtype(dtype)} holds"
    with pytest.raises(InputError, match=expected):
        fold(opened[0], opened[1:], np.full((1, 1), -1, np.float32))


def test_a_file_that_is_cut_off_after_it_was_opened(tmp_path):
    opened = saved(tmp_path, "base", np.ones((40, 5), np.float32))
    file = tmp_path / "base.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"base\.safetensors ends within weight; copy or download"):
        fold(opened, [opened], np.zeros((1, 1, 1), np.float32))
