"""What is shown of an objective is its distance from the best that a model can reach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.batches import calibrate
from adamerge_jax.data.expert_targets import ask_expert
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.learning.loop import Progress, learn
from adamerge_jax.mixing import materialize
from adamerge_jax.objectives import (
    CrossTaskTargets,
    Objective,
    Targets,
    TaskOutputs,
    entropy,
    logit_alignment,
    weighted_sum,
)
from adamerge_jax.objectives.distributions import likely_tokens
from adamerge_jax.task_vectors import task_vectors

GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


def tokens(logits: jax.Array, count: int) -> tuple[TaskOutputs, Targets]:
    labels = jnp.asarray([[1, -100, 2], [0, 3, -100]])
    return TaskOutputs(logits), Targets(expert_top=likely_tokens(logits, count), labels=labels)


CLASSES = normal(4, 5)
CASES = {
    "classes": (TaskOutputs(CLASSES), Targets(expert_logits=CLASSES)),
    "tokens": tokens(normal(2, 3, 9), 4),
    "other tasks": (
        TaskOutputs(CLASSES, cross_task_logits=(others := normal(4, 2, 5))),
        Targets(expert_logits=CLASSES, cross_task=CrossTaskTargets(others, jnp.ones((4, 2)))),
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_the_floor_is_the_value_of_the_expert_itself(case, temperature):
    outputs, targets = CASES[case]
    soft = logit_alignment(temperature=temperature, cross_task=0.5)
    np.testing.assert_allclose(soft.floor(targets), soft.value(outputs, targets), rtol=1e-5)
    # Of other outputs the value less the floor is the divergence.
    other = jax.tree.map(lambda logits: logits + jnp.sin(7 * logits), outputs)
    distance = soft.value(other, targets) - soft.floor(targets)
    divergence = logit_alignment(temperature=temperature, cross_task=0.5, form="kl")
    np.testing.assert_allclose(distance, divergence.value(other, targets), rtol=1e-4, atol=1e-5)
    assert (distance > 1e-3).all()


def test_floors_of_sums():
    _, targets = CASES["classes"]
    soft = logit_alignment()
    both = weighted_sum([(2.0, soft), (-0.5, entropy()), (-1.0, logit_alignment(form="hard"))])
    np.testing.assert_allclose(both.floor(targets), 2 * soft.floor(targets))
    assert weighted_sum([(1.0, entropy())]).floor is None
    assert logit_alignment(form="kl").floor is logit_alignment(form="hard").floor is None


def test_only_what_is_shown_changes():
    """The coefficients, bit for bit, are those of the same objective without a floor."""
    base = {"kernel": normal(3, 4)}
    experts = [{"kernel": base["kernel"] + normal(3, 4)} for _ in range(2)]
    deltas = task_vectors(base, experts)
    granularity = make_granularity("tensor", {}, {"kernel": (3, 4)})
    soft = logit_alignment()
    data, targets = {}, {}
    for task, expert in zip("ab", experts, strict=True):
        data[task] = ArrayExamples({"x": np.asarray(normal(20, 3))})
        asked = lambda inputs, kernel=expert["kernel"]: (inputs["x"] @ kernel, {})  # noqa: E731
        targets[task] = ask_expert(asked, data[task], soft.target_spec, batch_size=8)
    calibration = calibrate(data, batch_size=4, held_out=0.3, seed=0, targets=targets)

    def forward(parameters, heads, inputs):
        logits = inputs["x"] @ materialize(parameters)["kernel"]
        return [TaskOutputs(of_task) for of_task in jnp.split(logits, 2)]

    runs = []
    for objective in (soft, Objective(soft.value, soft.target_spec), logit_alignment(form="kl")):
        seen: list[Progress] = []
        learner = make_learner(
            forward, granularity, CONSTRAINTS["free"], objective, optax.adam(0.05)
        )
        initial = granularity.init(constant({"kernel": (3, 4)}, 2, 0.3))
        frozen = Frozen(base, deltas, ())
        learned = learn(
            learner, frozen, initial, calibration, steps=6, evaluate_every=3, on_step=seen.append
        )
        runs.append((learned, seen))
    (shown, seen), (plain, seen_plain), (_, seen_divergence) = runs
    assert shown.step == plain.step
    np.testing.assert_array_equal(shown.values["kernel"], plain.values["kernel"])
    np.testing.assert_array_equal(shown.held_out.objective, plain.held_out.objective)
    for one, without, divergence in zip(seen, seen_plain, seen_divergence, strict=True):
        for name in ("per_task", "held_out"):
            values = [getattr(progress, name) for progress in (one, without, divergence)]
            if values[0] is None:
                continue
            if name == "held_out":
                values = [metrics.objective for metrics in values]
            assert (values[0] < values[1] - 0.01).all() and (values[0] > 0).all()
            np.testing.assert_allclose(values[0], values[2], rtol=0.05, atol=1e-4)
