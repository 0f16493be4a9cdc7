"""Merged tensors against the sum in float64, and sums that their dtype cannot hold."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.read import load_backbone, load_task_vectors
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_base, train
from tests.references import edit_weights, random_coefficients

NORM = "model.norm.weight"
EXPERTS = {"single": np.float32, "brain": ml_dtypes.bfloat16, "half": np.float16}


@pytest.fixture(scope="module", params=EXPERTS.values(), ids=EXPERTS)
def root(request, tmp_path_factory) -> Path:
    """A LLaMA in one dtype, whole experts of it in three, and an adapter."""
    root = tmp_path_factory.mktemp("sums")
    save_base("llama", root / "base")
    config = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
    train(AutoModelForCausalLM.from_pretrained(root / "base"), root / "adapter", config)
    weights = load_file(root / "base" / "model.safetensors")
    generator = np.random.default_rng(0)
    for task, dtype in EXPERTS.items():
        AutoModelForCausalLM.from_pretrained(root / "base").save_pretrained(root / task)
        changed = {
            name: (array + generator.normal(0, 0.3, array.shape)).astype(dtype)
            for name, array in weights.items()
        }
        save_file(changed, root / task / "model.safetensors", metadata={"format": "pt"})
    edit_weights(
        root / "base",
        lambda t: t.update({name: array.astype(request.param) for name, array in t.items()}),
    )
    return root


def opened(root: Path, tasks: list[str]) -> Models:
    fields = {task: {"expert": str(root / task), "calibration": "none"} for task in tasks}
    return open_models(parse_recipe({"base": str(root / "base"), "tasks": fields}), Path("/"))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_every_merged_tensor_is_the_float64_sum_rounded_once(root, granularity, with_adapter):
    models = opened(root, [*EXPERTS, *["adapter"] * with_adapter])
    coefficients = random_coefficients(models, granularity)
    scales = {name: np.asarray(s, np.float64) for name, s in coefficients.scales().items()}
    files = {task: load_file(root / task / "model.safetensors") for task in ("base", *EXPERTS)}
    merged = dict(fold(models, coefficients))
    assert merged.keys() == scales.keys() == files["base"].keys()
    for name, result in merged.items():
        base = files["base"][name].astype(np.float64)
        exact, magnitude = base, np.abs(base)
        for scale, (task, expert) in zip(scales[name], models.experts.items(), strict=True):
            if task in files:
                delta = files[task][name].astype(np.float64) - base
            elif factors := expert.low_rank(name):
                delta = factors.left.astype(np.float64) @ factors.right.astype(np.float64)
            else:
                continue
            exact = exact + scale * delta
            magnitude = magnitude + np.abs(scale) * (np.abs(delta) + 2 * np.abs(base))
        assert result.dtype == files["base"][name].dtype
        # The rounding to the dtype, by half a unit in the last place, and those of float32 before
        # it: a few for each of the terms.
        precision = ml_dtypes.finfo(result.dtype)
        rounding = np.maximum(
            np.abs(exact) * float(precision.eps) / 2, float(precision.smallest_subnormal)
        )
        error = np.abs(result.astype(np.float64) - exact)
        assert (error <= rounding + 8 * np.finfo(np.float32).eps * magnitude).all(), name


# Sums and differences that overflow


def doctored(tmp_path: Path, dtype: type, base: float, expert: float) -> Models:
    """A base and an expert that differ in one value."""
    save_base("llama", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for role, value in (("base", base), ("expert", expert)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / role)
        changed = {name: array.astype(dtype) for name, array in weights.items()}
        changed[NORM][1] = value
        save_file(changed, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
    return opened(tmp_path, ["expert"])


@pytest.mark.parametrize(
    "dtype, large, part",
    [
        (np.float16, 6e4, "more than float16 holds; set task_vectors.dtype to bfloat16"),
        (np.float32, 3e38, f"difference of {NORM} from the base's is more than float32 holds"),
        (ml_dtypes.bfloat16, 3e38, f"difference of {NORM} from the base's is more than float32"),
        (np.float64, 1e39, f"{NORM} holds 1 Inf among its"),
    ],
)
def test_differences_that_overflow_are_refused_by_name(tmp_path, dtype, large, part):
    models = doctored(tmp_path, dtype, large, -large)
    with pytest.raises(InputError) as caught:
        load_task_vectors(models, None)
    message = str(caught.value)
    assert part in message and NORM in message and "\n" not in message
    if dtype != np.float64:
        assert f"expert 'expert' ({tmp_path / 'expert'})" in message
    if dtype == np.float16:
        assert load_task_vectors(models, np.dtype(np.float32))


def test_weights_that_their_dtype_in_the_run_cannot_hold(tmp_path):
    models = doctored(tmp_path, np.float32, 1.0, 7e4)
    with pytest.raises(InputError, match=f"{NORM} has values of up to 7e.04.* set dtype to"):
        load_backbone(models, models.experts["expert"], np.dtype(np.float16))


def test_coefficients_that_no_sum_can_hold(tmp_path):
    models = doctored(tmp_path, np.float16, 1.0, 2.0)
    coefficients = random_coefficients(models)
    for factor in (1e38, 1e30, 1e300, -1e25):
        with pytest.raises(InputError, match="are not finite in float32, or the squares"):
            coefficients.times({"expert": factor})
    with pytest.raises(InputError, match=r"the merge of \S+ has values that are more than float16"):
        list(fold(models, coefficients.times({"expert": 1e15})))
