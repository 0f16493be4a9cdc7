"""What a benchmark measures is what it says: the fold benchmark on small models."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import LlamaConfig

from tests.adapter_references import LLAMA
from tests.references import load_script

FOLD = load_script(Path(__file__).parents[2] / "experiments" / "benchmarks" / "fold.py")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads its memory from /proc")
def test_fold_writes_the_merge_that_it_times(tmp_path, monkeypatch):
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    monkeypatch.setattr(FOLD, "CONFIG", config)
    FOLD.write_models(tmp_path, "float32")
    FOLD.write_coefficients(tmp_path, "float32")
    result = FOLD.run_variant("fold", tmp_path, "float32", tmp_path / "out")
    assert result.seconds > 0 and 0 < result.floor <= result.peak
    (file,) = FOLD.weight_files(tmp_path, ["out/checkpoint"])
    merged, base, *experts = (
        load_file(each) for each in [file, *FOLD.weight_files(tmp_path, ["base", *FOLD.EXPERTS])]
    )
    assert merged.keys() == base.keys()
    for name, values in merged.items():
        change = sum(expert[name] - base[name] for expert in experts)
        np.testing.assert_allclose(values, base[name] + FOLD.COEFFICIENT * change, atol=1e-6)


def test_the_plain_step_that_steps_are_compared_with(monkeypatch):
    folder = Path(__file__).parents[2] / "experiments" / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    gradient = load_script(folder / "step.py").plain_step("small")()
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(gradient))
    assert max(np.abs(array).max() for array in jax.tree.leaves(gradient)) > 0
