"""The losses of heads: gradients by differences, 0 at the expert's outputs, fits that find it."""

import numpy as np
import pytest
from scipy.special import expit

from adamerge_jax.heads.fitted import fit_head
from adamerge_jax.heads.losses import OF_CLASSES, OF_LABELS, of_choices, of_numbers, spread_of

GENERATOR = np.random.default_rng(0)
EXPERT = GENERATOR.normal(size=(6, 3)) * [1.0, 4.0, 0.2]
LOSSES = {"classes": OF_CLASSES, "labels": OF_LABELS, "numbers": of_numbers(EXPERT)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradient_and_excess(loss):
    outputs = GENERATOR.normal(size=EXPERT.shape)
    wanted = loss.wanted(EXPERT)
    _, gradient = loss.value(outputs, wanted)
    step = 1e-6
    for place in np.ndindex(outputs.shape):
        moved = [outputs.copy(), outputs.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        values = [loss.value(side, wanted)[0] for side in moved]
        assert gradient[place] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)
    assert loss.excess(EXPERT, EXPERT) == pytest.approx(0, abs=1e-12)
    difference = loss.value(outputs, wanted)[0] - loss.value(EXPERT, wanted)[0]
    assert loss.excess(outputs, EXPERT) == pytest.approx(difference / len(EXPERT))


def test_formulas():
    outputs, first, second = np.array([[0.3, -2.0]]), expit(0.3), expit(-2.0)
    expert = np.array([[1.0, 0.0]])
    wanted, other = expit(1.0), 0.5
    divergence = sum(
        p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        for p, q in ((wanted, first), (other, second))
    )
    assert OF_LABELS.excess(outputs, expert) == pytest.approx(divergence)
    np.testing.assert_allclose(spread_of(EXPERT), EXPERT.std(0))
    assert spread_of(np.ones((3, 1))) == [1.0]
    half = 0.5 * np.square(EXPERT / EXPERT.std(0)).sum(-1).mean()
    assert of_numbers(EXPERT).excess(np.zeros_like(EXPERT), EXPERT) == pytest.approx(half)


def test_choices_are_classes_side_by_side():
    outputs = GENERATOR.normal(size=EXPERT.shape)
    by_choice, of_expert = outputs.reshape(-1, 1), EXPERT.reshape(-1, 1)
    loss = of_choices(3)
    total, slope = loss.value(by_choice, loss.wanted(of_expert))
    expected, expected_slope = OF_CLASSES.value(outputs, OF_CLASSES.wanted(EXPERT))
    assert total == expected
    np.testing.assert_array_equal(slope.reshape(-1, 3), expected_slope)
    assert loss.excess(by_choice, of_expert) == OF_CLASSES.excess(outputs, EXPERT)


@pytest.mark.parametrize("kind", ["scaled", "refitted"])
@pytest.mark.parametrize("name", ["labels", "numbers"])
def test_a_fit_finds_the_head_that_gives_the_experts_outputs(name, kind):
    features, weight, bias = (GENERATOR.normal(size=size) for size in ((200, 4), (2, 4), (2,)))
    scale = np.array([1.5, 0.7])
    outputs = scale * (features @ weight.T + bias) + [0.3, -0.2]
    loss = OF_LABELS if name == "labels" else of_numbers(outputs)
    fit = fit_head(features, outputs, weight, bias, kind=kind, seed=0, loss=loss)
    assert fit.kl < 0.01 * fit.kl_before
    np.testing.assert_allclose(features @ fit.weight.T + fit.bias, outputs, atol=0.1)


def test_words_of_a_text_are_judged_together():
    """With each text's words alike, folds that part them would find the fit of noise good."""
    features = np.repeat(GENERATOR.normal(size=(12, 8)), 20, axis=0)
    outputs = np.repeat(GENERATOR.normal(size=(12, 2)), 20, axis=0)
    weight, bias = np.zeros((2, 8)), np.zeros(2)
    groups = np.repeat(np.arange(12), 20)
    apart, together = (
        fit_head(features, outputs, weight, bias, kind="refitted", seed=0, groups=of_words)
        for of_words in (None, groups)
    )
    assert apart.kl < 0.7 * together.kl
