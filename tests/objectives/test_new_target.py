"""A new kind of target: its objective, `objectives/targets.py` and one function say all of it."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax import objectives
from adamerge_jax.data import expert_targets as asking
from adamerge_jax.objectives import Objective, Targets, TargetSpec, TaskOutputs
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.plan import memory as plan_memory
from adamerge_jax.plan import outline as plan_outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import learning_inputs

# What would stand in objectives/targets.py: a field of each of the two.


TargetsWithMean = namedtuple(
    "TargetsWithMean",
    [*Targets._fields, "expert_state_mean"],
    defaults=[*Targets._field_defaults.values(), None],
)


class SpecWithMean(TargetSpec):
    expert = True

    def __or__(self, other: TargetSpec) -> "SpecWithMean":
        return SpecWithMean(*super().__or__(other))

    __ror__ = __or__


# What would stand in data/expert_targets.py, in the function of that name.


def expert_targets(spec, logits, hidden_states) -> TargetsWithMean:
    targets = TARGETS_WITHOUT_MEAN(spec, logits, hidden_states)
    if not isinstance(spec, SpecWithMean):
        return TargetsWithMean(*targets)
    return TargetsWithMean(*targets, expert_state_mean=hidden_states[-1].mean(1))


TARGETS_WITHOUT_MEAN = asking.expert_targets

# What would be its own file, objectives/state_mean.py.


def state_mean() -> Objective:
    def value(outputs: TaskOutputs, targets: Targets):
        mean = outputs.hidden_states[-1].mean(1)
        return jnp.square(mean - targets.expert_state_mean).mean(-1)

    return Objective(value, SpecWithMean(hidden_states=(-1,)))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.OBJECTIVES, "state_mean", state_mean)
    for module in (asking, plan_outline, plan_memory):
        monkeypatch.setattr(module, "expert_targets", expert_targets)


def test_batches_parts_of_them_and_the_plan_carry_it(added, image_recipe, tmp_path):
    terms = [{"name": "state_mean"}, {"name": "entropy", "weight": 0.1}]
    values = []
    for microbatches in (1, 2):
        chosen = {"steps": 3, "batch_size": 4, "microbatches": microbatches}
        chosen |= {"optimizer": {"name": "sgd", "learning_rate": 0.05}}
        recipe = parse_recipe(image_recipe | {"objectives": terms, "learning": chosen})
        inputs = learning_inputs(recipe, tmp_path)
        values.append(learn_coefficients(inputs).values)
    batch = next(inputs.calibration.batches())
    planned = plan_outline.outline(recipe, tmp_path).batch(0)
    for targets, abstract in zip(batch.targets, planned.targets, strict=True):
        assert targets.expert_state_mean.shape == (4, 24)  # [B, H]
        states = targets.expert_hidden_states[-1]
        np.testing.assert_allclose(targets.expert_state_mean, states.mean(1), rtol=1e-5, atol=1e-6)
        assert jax.tree.map(np.shape, targets) == jax.tree.map(np.shape, abstract)
    assert plan_memory.targets_bytes(plan_outline.outline(recipe, tmp_path)) > 0
    for name, whole in values[0].items():
        assert np.abs(whole - 0.3).max() > 1e-4
        np.testing.assert_allclose(values[1][name], whole, atol=1e-6, err_msg=name)
