"""Fits of heads against the objective written out in PyTorch and minimised there."""

import math

import numpy as np
import pytest
import torch

from adamerge_jax.heads import fitted
from adamerge_jax.heads.fitted import fit_head

EXAMPLES, FEATURES, CLASSES = 60, 5, 3


def problem(examples: int = EXAMPLES) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features that are a rotation of those that the expert's head was made for."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(CLASSES, FEATURES))
    bias = generator.normal(size=CLASSES)
    original = generator.normal(size=(examples, FEATURES))
    rotation, _ = np.linalg.qr(generator.normal(size=(FEATURES, FEATURES)))
    noise = 0.1 * generator.normal(size=(examples, FEATURES))
    return original @ rotation + noise, original @ weight.T + bias, weight, bias


def reference(
    features: np.ndarray,
    expert_logits: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    strength: float,
    kind: str,
    has_bias: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises the objective of the docstring in float64; without a bias that of the weight."""
    x, t, w0, b0 = (torch.tensor(a) for a in (features, expert_logits, weight, bias))
    inputs = x @ w0.T + b0 if kind == "scaled" else x
    if kind == "scaled":
        anchor, shift = torch.ones(CLASSES, dtype=x.dtype), torch.zeros(CLASSES, dtype=x.dtype)
    else:
        anchor, shift = w0, b0

    def objective(flat: torch.Tensor) -> torch.Tensor:
        factor, b = flat[: anchor.numel()].view_as(anchor), flat[anchor.numel() :] * has_bias
        logits = inputs * factor + b if kind == "scaled" else inputs @ factor.T + b
        divergence = torch.nn.functional.kl_div(
            logits.log_softmax(-1), t.softmax(-1), reduction="batchmean"
        )
        size = inputs.square().mean()
        distance = size * (factor - anchor).square().sum() + (b - shift).square().sum()
        return divergence + strength / 2 * distance

    flat = torch.cat([anchor.flatten(), shift]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat], max_iter=1000, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective(flat)
        value.backward()
        return value

    optimizer.step(closure)
    flat = flat.detach()
    factor, b = flat[: anchor.numel()].view_as(anchor), flat[anchor.numel() :]
    if kind == "scaled":
        return (factor[:, None] * w0).numpy(), (factor * b0 + b).numpy()
    return factor.numpy(), b.numpy()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["scaled", "refitted"])
def test_the_fit_minimises_its_objective(kind, has_bias, monkeypatch):
    monkeypatch.setattr(fitted, "STRENGTHS", (0.03,))
    features, logits, weight, bias = problem()
    if not has_bias:
        logits, bias = logits - bias, np.zeros(CLASSES)
    fit = fit_head(features, logits, weight, bias if has_bias else None, kind=kind, seed=0)
    weight, bias = reference(features, logits, weight, bias, 0.03, kind, has_bias)
    assert fit.strength == 0.03
    np.testing.assert_allclose(fit.weight, weight, atol=1e-3)
    np.testing.assert_allclose(fit.bias, bias, atol=1e-3)


def test_a_refitted_head_undoes_a_rotation_and_a_scaled_one_cannot():
    fits = {kind: fit_head(*problem(), kind=kind, seed=0) for kind in ("scaled", "refitted")}
    assert fits["refitted"].kl < 0.2 * fits["refitted"].kl_before
    assert fits["refitted"].kl < 0.5 * fits["scaled"].kl


def test_the_experts_head_stays_where_nothing_is_better():
    features, _, weight, bias = problem()
    fit = fit_head(features, features @ weight.T + bias, weight, bias, kind="refitted", seed=0)
    assert fit.strength == math.inf
    np.testing.assert_array_equal(fit.weight, weight)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_too_few_examples_to_judge_keep_the_experts_head(examples):
    features, expert_logits, weight, bias = problem(examples)
    fit = fit_head(features, expert_logits, weight, bias, kind="refitted", seed=0)
    assert fit.strength == math.inf
    np.testing.assert_array_equal(fit.bias, bias)


def test_the_size_of_features_does_not_matter():
    features, expert_logits, weight, bias = problem()
    fit = fit_head(features, expert_logits, weight, bias, kind="refitted", seed=0)
    large = fit_head(100 * features, expert_logits, weight / 100, bias, kind="refitted", seed=0)
    assert large.strength == fit.strength
    np.testing.assert_allclose(100 * large.weight, fit.weight, atol=1e-2)


def test_the_same_seed_gives_the_same_bits():
    first, second = (fit_head(*problem(), kind="refitted", seed=3) for _ in range(2))
    assert first.weight.tobytes() == second.weight.tobytes()
