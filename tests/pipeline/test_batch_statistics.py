"""Statistics of batch normalisation: merged without data, estimated with some."""

import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from adamerge_jax.cli.main import main
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.methods import merged_parameters, task_arithmetic
from adamerge_jax.mixing import Mixture, materialize_compiled, mix, scale_gradient
from adamerge_jax.parameter_names import is_batch_statistic
from adamerge_jax.pipeline import batch_statistics
from adamerge_jax.runs.files import COEFFICIENTS_FILE
from adamerge_jax.runs.results import read_results
from adamerge_jax.task_vectors import DenseDelta
from tests.references import predictions, write_recipe

TASKS = ("cat", "dog")
COEFFICIENT = 0.8
VARIANCE = "resnet.embedder.embedder.normalization.running_var"


class OfPixels(torch.nn.Module):
    """A model that takes a batch as its only argument, as `update_bn` calls it."""

    def __init__(self, model: ResNetForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.model(pixel_values=pixels)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A ResNet, two experts whose statistics are far from it, data, and the recipe's fields."""
    root = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    base = ResNetForImageClassification(config)
    base.save_pretrained(root / "base")
    tasks = {}
    for shift, task in enumerate(TASKS, start=1):
        expert = copy.deepcopy(base)
        pixels = (generator.normal(size=(130, 3, 16, 16)) * 0.3 + shift).astype(np.float32)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        update_bn([torch.from_numpy(pixels)], OfPixels(expert))
        expert.save_pretrained(root / task)
        np.savez(root / f"{task}.npz", pixel_values=pixels)
        labels = generator.integers(0, 3, 40)
        np.savez(root / f"{task}.test.npz", pixel_values=pixels[:40], label=labels)
        tasks[task] = {
            "expert": str(root / task),
            "calibration": str(root / f"{task}.npz"),
            "test": {"path": str(root / f"{task}.test.npz"), "label": "label"},
        }
    return root, {"base": str(root / "base"), "tasks": tasks, "export": {"orbax": False}}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def merge(fields: dict[str, Any], folder: Path, coefficient: float = COEFFICIENT) -> Path:
    recipe = write_recipe(folder, fields)
    options = ["--method", "task_arithmetic", "--options", f"{{coefficient: {coefficient}}}"]
    main(["merge", str(recipe), *options, "--out", str(folder / "merge")])
    return folder / "merge"


def without_data(fields: dict[str, Any]) -> dict[str, Any]:
    tasks = {task: {"expert": of_task["expert"]} for task, of_task in fields["tasks"].items()}
    return {**fields, "tasks": tasks}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_merge_has_the_statistics_of_its_own_features(suite, tmp_path, capsys):
    root, fields = suite
    out = merge(fields, make(tmp_path / "estimated"))
    assert "12 statistics of batch normalisation are estimated" in capsys.readouterr().out
    merged, plain = tensors(out / "checkpoint"), merge(without_data(fields), tmp_path)
    assert "12 statistics of batch normalisation are merged" in capsys.readouterr().out
    for name, tensor in tensors(plain / "checkpoint").items():
        assert is_batch_statistic(name) or torch.equal(tensor, merged[name])

    model = ResNetForImageClassification.from_pretrained(root / "base")
    model.load_state_dict(tensors(plain / "checkpoint"), strict=False)
    pixels = np.concatenate([np.load(root / f"{task}.npz")["pixel_values"] for task in TASKS])
    batches = [torch.from_numpy(pixels[index]) for index in batch_statistics._batches(len(pixels))]
    assert [len(batch) for batch in batches] == [86, 86, 86]
    update_bn(batches, OfPixels(model))
    statistics = [name for name in merged if is_batch_statistic(name)]
    assert len(statistics) == 12
    for name in statistics:
        torch.testing.assert_close(merged[name], model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_the_file_repeats_the_merge(suite, tmp_path, capsys):
    _, fields = suite
    out = merge(fields, tmp_path)
    file, again = out / COEFFICIENTS_FILE, tmp_path / "again"
    main(["fold", str(tmp_path / "recipe.yaml"), str(file), "--out", str(again)])
    merged = tensors(out / "checkpoint")
    for name, tensor in tensors(again / "checkpoint").items():
        assert torch.equal(tensor, merged[name])
    assert all(map(is_batch_statistic, Coefficients.load(file).initial_tensors))
    main(["inspect", str(file)])
    assert "statistics of batch normalisation stored" in " ".join(capsys.readouterr().out.split())


def test_a_file_stores_no_other_tensor_of_such_a_merge(suite, tmp_path):
    _, fields = suite
    loaded = Coefficients.load(merge(fields, tmp_path) / COEFFICIENTS_FILE)
    loaded.initial_tensors["resnet.embedder.embedder.convolution.weight"] = np.zeros((4, 3, 7, 7))
    loaded.save(tmp_path / COEFFICIENTS_FILE)
    with pytest.raises(InputError, match=r"has the tensor .*convolution\.weight of its merge"):
        Coefficients.load(tmp_path / COEFFICIENTS_FILE)


def test_rows_of_the_table_have_estimated_statistics(suite, tmp_path):
    root, fields = suite
    out = merge(fields, tmp_path)
    evaluation = {"methods": [{"name": "task_arithmetic", "options": {"coefficient": COEFFICIENT}}]}
    learned = {"heads": "kept", "learning": {"steps": 2, "batch_size": 4}, "evaluation": evaluation}
    recipe = write_recipe(tmp_path, {**fields, **learned})
    main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    row = read_results(tmp_path / "run" / "results.json").rows[-2]
    assert row.method == f"task_arithmetic (coefficient {COEFFICIENT})"
    for task in TASKS:
        data = np.load(root / f"{task}.test.npz")
        model = AutoModelForImageClassification.from_pretrained(out / "checkpoint/tasks" / task)
        predicted = predictions(model, {"pixel_values": torch.from_numpy(data["pixel_values"])})
        assert row.tasks[task] == pytest.approx(np.mean(predicted == data["label"]))


@pytest.mark.parametrize("way", ["fold", "method", "mix"])
def test_no_variance_is_less_than_the_least_of_all_models(way, suite, tmp_path):
    root, fields = suite
    base, *experts = (tensors(root / name)[VARIANCE].numpy() for name in ("base", *TASKS))
    coefficient, delta = -3.0, DenseDelta(jnp.asarray([expert - base for expert in experts]))
    linear = base + coefficient * sum(expert - base for expert in experts)
    assert linear.min() < 0
    expected = np.maximum(linear, np.min([base, *experts], axis=0))
    if way == "fold":
        folder = merge(without_data(fields), tmp_path, coefficient) / "checkpoint"
        merged = tensors(folder)[VARIANCE].numpy()
    elif way == "method":
        by_method = task_arithmetic(coefficient)
        merged = merged_parameters(by_method, {VARIANCE: jnp.asarray(base)}, {VARIANCE: delta}, 2)
        merged = merged[VARIANCE]
    else:
        scales = {VARIANCE: jnp.full((2, 1), coefficient)}
        merged = materialize_compiled(mix({VARIANCE: jnp.asarray(base)}, {VARIANCE: delta}, scales))
        merged = merged[VARIANCE]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


def test_a_variance_at_its_bound_has_no_gradient():
    delta = DenseDelta(jnp.array([[-0.5, 0.5]]))
    mixture = Mixture(jnp.ones(2), delta, jnp.full((1, 2), 3.0), is_variance=True)
    assert mixture.materialize().tolist() == [0.5, 2.5]
    gradient = scale_gradient(mixture, jnp.ones(2), stacked=False)
    assert gradient.tolist() == [[0.0, 0.5]]
