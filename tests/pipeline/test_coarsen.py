"""Coarse coefficients against a solver of least squares in float64 on the weights themselves."""

from pathlib import Path

import numpy as np
import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.pipeline.coarsen import coarsen
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_experts
from tests.references import random_coefficients, write_recipe

# Weights and what is read of them are float32, of which a sum of squares loses half the digits.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def changes(models: Models, name: str) -> np.ndarray:
    """The K experts' changes of a tensor, `[K, N]`, in float64."""
    base = models.base.read(name).astype(np.float64)
    return np.stack([(expert.read(name) - base).reshape(-1) for expert in models.experts.values()])


def by_row(coefficients: Coefficients, name: str) -> np.ndarray:
    """The coefficients of a tensor's entries, `[K, N]`."""
    shape = coefficients.shapes[name]
    scale = np.asarray(coefficients.scales()[name], np.float64)
    return np.broadcast_to(scale, (len(scale), *shape)).reshape(len(scale), -1)


@pytest.fixture(scope="module")
def models(text_fields) -> Models:
    return open_models(parse_recipe(text_fields), Path("/"))


@pytest.mark.parametrize("to", ["tensor", "task"])
def test_they_are_the_least_squares_solution(to: str, models: Models):
    fine = random_coefficients(models, "row")
    coarsened = coarsen(models, fine, to)
    coarse, losses = coarsened
    together = {name: [name] if to == "tensor" else list(fine.shapes) for name in fine.shapes}
    lost, change = [], []
    for loss in losses:
        members = together[loss.name]
        tau = {name: changes(models, name) for name in members}
        merged = {name: (by_row(fine, name) * tau[name]).sum(0) for name in members}
        expected, *_ = np.linalg.lstsq(
            np.concatenate([tau[name].T for name in members]),
            np.concatenate([merged[name] for name in members]),
            rcond=None,
        )
        np.testing.assert_allclose(coarse.per_tensor()[loss.name], expected, **TOLERANCE)
        difference = np.linalg.norm(expected @ tau[loss.name] - merged[loss.name])
        np.testing.assert_allclose(loss.lost, difference, **TOLERANCE)
        lost.append(difference)
        change.append(np.linalg.norm(merged[loss.name]))
        if to == "task":
            break  # all of them have one solution
    if to == "tensor":
        assert coarse.constraint == "free" and coarse.granularity == "tensor"
        relative = np.linalg.norm(lost) / np.linalg.norm(change)
        assert 0.01 < relative < 1
        np.testing.assert_allclose(coarsened.relative, relative, rtol=1e-5)


def test_experts_that_changed_alike_share_the_sum_and_nothing_is_lost(text_fields):
    tone = text_fields["tasks"]["tone"]
    fields = text_fields | {"tasks": {"tone": tone, "twin": tone}}
    twins = open_models(parse_recipe(fields), Path("/"))
    given = random_coefficients(twins, "tensor")
    coarse, losses = coarsen(twins, given, "tensor")
    for name, values in coarse.per_tensor().items():
        np.testing.assert_allclose(values, np.full(2, given.per_tensor()[name].mean()), atol=1e-5)
    assert max(loss.relative for loss in losses) < 1e-6


def test_adapters_give_what_their_merged_models_give(tmp_path: Path):
    of_adapters, of_whole = save_experts("bert", tmp_path)
    adapters, whole = (
        open_models(parse_recipe(fields), Path("/")) for fields in (of_adapters, of_whole)
    )
    fine = random_coefficients(adapters, "row")
    coarse, losses = coarsen(adapters, fine, "tensor")
    expected, losses_of_whole = coarsen(whole, fine, "tensor")
    for loss, of_same in zip(losses, losses_of_whole, strict=True):
        # PEFT rounds its merged weights to float32 once more.
        np.testing.assert_allclose(loss[1:], of_same[1:], rtol=1e-3, atol=1e-6)
        name = loss.name
        np.testing.assert_allclose(
            coarse.per_tensor()[name], expected.per_tensor()[name], rtol=1e-3, atol=1e-4
        )


def test_the_command_says_what_is_lost_and_makes_coefficients_of_tensors(
    text_fields, models, tmp_path, capsys
):
    recipe, run, out = (
        write_recipe(tmp_path, text_fields),
        tmp_path / "run",
        tmp_path / "c.safetensors",
    )
    run.mkdir()
    random_coefficients(models, "row").save(run / "coefficients.safetensors")
    cli.main(["coarsen", str(recipe), str(run), "-o", str(out)])
    printed = capsys.readouterr().out
    assert "lost of the change from the base: " in printed and "% in all, most in" in printed
    # The coefficients will do; mergekit wants base and experts with the same tensors, too.
    for file, message in (
        (run, "`adamerge coarsen` finds"),
        (out, "all models must have the same"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["mergekit", str(recipe), str(file), "--out", str(tmp_path / "merge.yaml")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["coarsen", str(recipe), str(run), "-o", str(out)])
    assert "expected a new file" in capsys.readouterr().err
