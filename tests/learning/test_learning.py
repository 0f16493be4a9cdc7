"""Learning, against a plain PyTorch loop and against its own promises."""

import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.func import functional_call
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.file import unstack_values
from adamerge_jax.coefficients.granularities import Granularity, Values, constant, make_granularity
from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.batches import Calibration, calibrate
from adamerge_jax.data.expert_targets import StoredTargets
from adamerge_jax.errors import NonFiniteObjectiveError
from adamerge_jax.learning import held_out
from adamerge_jax.learning import learner as learning
from adamerge_jax.learning.evaluation import Evaluation
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.held_out import Control
from adamerge_jax.learning.learner import Frozen, Learner, State
from adamerge_jax.learning.loop import Progress, learn
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.mixing import materialize_compiled, mix
from adamerge_jax.objectives import make_objective
from adamerge_jax.recipes.build import build_objectives
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import edit_weights, learning_inputs

STEPS = 20
BATCH_SIZE = 4


class Setup(NamedTuple):
    """All arguments of `learn`."""

    granularity: Granularity
    learner: Learner
    frozen: Frozen
    initial: Values
    calibration: Calibration

    def learn(self, steps: int = STEPS, evaluate_every: int = 5, **options):
        return learn(
            self.learner,
            self.frozen,
            self.initial,
            self.calibration,
            steps=steps,
            evaluate_every=evaluate_every,
            **options,
        )


def set_up(
    fields: dict[str, Any],
    folder: Path,
    *,
    granularity: str = "tensor",
    constraint: str = "clip",
    objective: str = "entropy",
    initial: float = 0.3,
    **optimizer: Any,
) -> Setup:
    recipe = parse_recipe(
        fields
        | {
            "preset": "adamerging",
            "objectives": [{"name": objective}],
            "learning": {"batch_size": BATCH_SIZE, "optimizer": optimizer},
        }
    )
    inputs = learning_inputs(recipe, folder)
    workspace = inputs.workspace
    chosen = make_granularity(granularity, {}, inputs.shapes)
    learner = learning.make_learner(
        forward_with_heads(workspace.backbone, list(workspace.head_networks.values())),
        chosen,
        CONSTRAINTS[constraint],
        make_objective(objective, {}),
        build_optimizer(recipe.learning.optimizer, STEPS),
    )
    frozen = Frozen(inputs.base, inputs.deltas, list(workspace.heads.values()))
    start = chosen.init(constant(inputs.shapes, inputs.experts, initial))
    return Setup(chosen, learner, frozen, start, inputs.calibration)


def names_in_file(model: PreTrainedModel, folder: str) -> dict[str, str]:
    """What the file calls the parameters of a loaded model: `transformers` renames some of them."""
    names = {
        array.tobytes(): name for name, array in load_file(f"{folder}/model.safetensors").items()
    }
    return {name: names[array.numpy().tobytes()] for name, array in model.state_dict().items()}


def pytorch_loop(
    experts: list[PreTrainedModel],
    base: dict[str, torch.Tensor],
    calibration: Calibration,
    granularity: str,
    initial: float,
    objective: str,
) -> tuple[dict[str, np.ndarray], list[list[float]]]:
    """AdaMerging as a PyTorch user would write it: each task in turn, one merged state dict.

    Returns:
        Coefficients `[K]` by group, and the objective of each task at each step.
    """
    states = [expert.state_dict() for expert in experts]
    deltas = {
        name: torch.stack([state[name] - base[name] for state in states])
        for name in base
        if any(not torch.equal(state[name], base[name]) for state in states)
    }
    groups = {name: "all" if granularity == "task" else name for name in deltas}
    raw = {
        group: torch.full((len(experts),), initial, requires_grad=True) for group in groups.values()
    }
    optimizer = torch.optim.Adam(raw.values(), lr=1e-3)
    objectives = []
    for batch in islice(calibration.batches(), STEPS):
        merged = dict(base)
        for name, delta in deltas.items():
            coefficients = raw[groups[name]].clamp(0, 1)
            merged[name] = base[name] + torch.tensordot(coefficients, delta, dims=1)
        losses = []
        for position, (expert, state) in enumerate(zip(experts, states, strict=True)):
            own = slice(position * BATCH_SIZE, (position + 1) * BATCH_SIZE)
            inputs = {k: torch.from_numpy(v[own]).clone() for k, v in batch.inputs.items()}
            logits = functional_call(expert, state | merged, kwargs=inputs).logits.log_softmax(-1)
            weights = logits.exp()
            if objective == "logit_alignment":
                with torch.no_grad():
                    weights = expert(**inputs).logits.softmax(-1)
            losses.append(-(weights * logits).sum(-1).mean())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        objectives.append([loss.item() for loss in losses])
    return {g: values.detach().clamp(0, 1).numpy() for g, values in raw.items()}, objectives


@pytest.mark.parametrize(
    ("model", "granularity", "initial", "objective"),
    [
        ("text", "task", 0.3, "entropy"),
        ("text", "tensor", 0.3, "entropy"),
        ("text", "tensor", 1.0, "entropy"),  # at the end of the range
        ("text", "tensor", 0.3, "logit_alignment"),
        ("image", "tensor", 0.3, "entropy"),
    ],
)
def test_same_coefficients_as_a_pytorch_loop(
    model, granularity, initial, objective, request, tmp_path
):
    fields = request.getfixturevalue(f"{model}_recipe")
    setup = set_up(fields, tmp_path, granularity=granularity, objective=objective, initial=initial)
    auto_class, prefix = {
        "text": (AutoModelForSequenceClassification, "bert."),
        "image": (AutoModelForImageClassification, "vit."),
    }[model]
    experts = [
        auto_class.from_pretrained(task["expert"]).eval().requires_grad_(False)
        for task in fields["tasks"].values()
    ]
    state = setup.learner.init(setup.initial)
    objectives = []
    for batch in islice(setup.calibration.batches(), STEPS):
        state, per_task = setup.learner.step(state, setup.frozen, batch)
        objectives.append(per_task)
    learned = unstack_values(setup.learner.coefficients(state))

    own = type(experts[0].base_model).from_pretrained(fields["base"]).state_dict()
    shared = experts[0].state_dict()
    base = {prefix + name: array for name, array in own.items() if prefix + name in shared}
    expected, losses = pytorch_loop(
        experts, base, setup.calibration, granularity, initial, objective
    )
    if granularity == "tensor":
        in_file = names_in_file(experts[0], next(iter(fields["tasks"].values()))["expert"])
        expected = {in_file[name]: values for name, values in expected.items()}

    # Both in float32; sums in another order change the last digits.
    np.testing.assert_allclose(objectives, losses, rtol=0, atol=1e-4)
    assert learned.keys() == expected.keys()
    moved = 0.0
    for group, values in expected.items():
        np.testing.assert_allclose(learned[group], values, rtol=0, atol=1e-5, err_msg=group)
        moved = max(moved, float(np.abs(values - initial).max()))
    assert moved > 1e-3


def test_the_best_look_is_returned_and_never_worse_than_the_start(
    text_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(held_out, "FEWEST_TO_CHOOSE", 1)
    # Far too large a step: held-out entropy goes up and down.
    setup = set_up(text_recipe, tmp_path, granularity="task", name="sgd", learning_rate=3.0)
    seen: list[Progress] = []
    learned = setup.learn(steps=12, evaluate_every=2, on_step=seen.append)
    assert [progress.step for progress in seen] == list(range(13))
    assert seen[0].per_task is None
    assert all(progress.per_task.shape == (3,) for progress in seen[1:])
    evaluations = {p.step: p.held_out.objective.sum() for p in seen if p.held_out is not None}
    assert list(evaluations) == [0, 2, 4, 6, 8, 10, 12]
    # Every step is the same compiled function.
    assert setup.learner.step._cache_size() == setup.learner.evaluate._cache_size() == 1
    best = min(evaluations, key=evaluations.get)
    assert learned.step == best
    assert learned.held_out.objective.sum() == evaluations[best] <= evaluations[0]
    # The objective of the returned coefficients, computed anew.
    state = setup.learner.init(learned.values)
    batches = setup.calibration.held_out_batches()
    again = sum(setup.learner.evaluate(state, setup.frozen, batch).objective for batch in batches)
    np.testing.assert_allclose(again, learned.held_out.objective, rtol=1e-5)


def test_the_start_is_returned_when_nothing_is_better(text_recipe, tmp_path):
    setup = set_up(text_recipe, tmp_path, learning_rate=0.02)

    def step_back(state, frozen, batch):
        """Goes where entropy rises."""
        new, per_task = setup.learner.step(state, frozen, batch)
        raw = {group: 2 * array - new.raw[group] for group, array in state.raw.items()}
        return new._replace(raw=raw), per_task

    seen: list[Progress] = []
    uphill = setup._replace(
        learner=setup.learner._replace(step=step_back),
        calibration=setup.calibration._replace(held_out=setup.calibration.learning),
    )
    learned = uphill.learn(steps=6, evaluate_every=3, on_step=seen.append)
    assert seen[-1].held_out.objective.sum() > seen[0].held_out.objective.sum()
    assert learned.step == 0
    assert all((values == np.float32(0.3)).all() for values in learned.values.values())


def test_same_seed_same_coefficients_bit_for_bit(text_recipe, tmp_path):
    setups = [set_up(text_recipe, tmp_path, learning_rate=0.02) for _ in range(2)]
    first, second = (setup.learn(steps=4) for setup in setups)
    assert first.step == second.step
    for group, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[group])
    other_seed = setups[0].calibration._replace(seed=1)
    other = setups[0]._replace(calibration=other_seed).learn(steps=4)
    assert any((values != other.values[group]).any() for group, values in first.values.items())


def test_divergence_keeps_the_best_so_far(text_recipe, tmp_path):
    setup = set_up(text_recipe, tmp_path, granularity="task", constraint="free", learning_rate=1e30)
    with pytest.raises(NonFiniteObjectiveError, match=r"step \d+, task 'tone'.* is nan") as caught:
        setup.learn()
    best = caught.value.learned
    assert best.step == 0
    np.testing.assert_array_equal(best.values["all"], np.full((1, 3), 0.3, np.float32))


def test_an_expert_with_extreme_values(text_recipe, tmp_path):
    shutil.copytree(text_recipe["tasks"]["mood"]["expert"], tmp_path / "mood")
    text_recipe["tasks"]["mood"]["expert"] = str(tmp_path / "mood")

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["classifier.weight"] *= np.float32(1e38)

    edit_weights(tmp_path / "mood", enlarge)
    setup = set_up(text_recipe, tmp_path, granularity="task")
    with pytest.raises(NonFiniteObjectiveError, match=r"step 0, task 'mood': .*held-out") as caught:
        setup.learn()
    assert caught.value.learned is None


class Scripted:
    """A learner whose objective and predictions at each step are given."""

    def __init__(self, objectives: list[list[float]], wrong: list[list[int]]):
        """`objectives[step][task]`, and how many of a task's examples get class 1, not their own.

        Every example's own class is its index modulo 2.
        """
        self.objectives, self.wrong = objectives, wrong
        self.learner = Learner(self.init, self.step, self.evaluate, lambda state: state.raw)

    def init(self, values: Values, heads: Any = ()) -> State:
        return State({"all": jnp.zeros((1, 2))}, (), values)

    def step(self, state: State, frozen: Frozen, batch: Any):
        return state._replace(raw={"all": state.raw["all"] + 1}), jnp.zeros(2)

    def evaluate(self, state: State, frozen: Frozen, batch: Any) -> Evaluation:
        step = int(state.raw["all"][0, 0])
        numbers = batch.inputs["pixel_values"].reshape(2, -1)
        predicted = [
            np.where(own // 2 < wrong, 1, own % 2)
            for own, wrong in zip(numbers, self.wrong[step], strict=True)
        ]
        share = batch.weights.sum(1)
        return Evaluation(np.array(self.objectives[step]) * share, np.stack(predicted))


def run_script(
    script: Scripted,
    seen: list[Progress],
    control: Control | None = None,
    held_out: int = 20,
    **callbacks: Any,
):
    examples = {t: ArrayExamples({"pixel_values": np.arange(40)}) for t in ("first", "second")}
    calibration = calibrate(examples, batch_size=20, held_out=0.5, seed=0)
    chosen_by = dict.fromkeys(examples, np.arange(held_out))
    for data in examples.values():
        data.labels = np.arange(40) % 2
    targets = {task: StoredTargets(data) for task, data in examples.items()}
    return learn(
        script.learner,
        Frozen({}, {}, []),
        {},
        calibration._replace(held_out=chosen_by, targets=targets),
        steps=len(script.objectives) - 1,
        evaluate_every=1,
        control=control,
        on_step=seen.append,
        **callbacks,
    )


def test_a_collapse_is_reported_and_not_kept():
    seen: list[Progress] = []
    # At step 2 all examples of the second task get class 1, while the objective falls.
    script = Scripted([[1.0, 1.0], [0.9, 0.9], [0.5, 0.1]], [[0, 0], [0, 2], [0, 10]])
    learned = run_script(script, seen)
    assert learned.step == 1
    assert [progress.collapsed for progress in seen] == [(), (), ("second",)]
    assert [progress.best is not None for progress in seen] == [True, True, False]
    np.testing.assert_allclose(seen[1].held_out.agreement, [1.0, 0.9])
    np.testing.assert_allclose(seen[2].held_out.commonest, [0.5, 1.0])


def test_one_class_from_the_start_is_no_collapse():
    seen: list[Progress] = []
    learned = run_script(Scripted([[1.0, 1.0], [0.5, 0.1]], [[0, 10], [0, 10]]), seen)
    assert learned.step == 1
    assert seen[-1].collapsed == ()


def test_forgetting_stops_before_the_control_tasks_suffer():
    seen: list[Progress] = []
    objectives = [[0.0, 1.0], [-1.0, 1.0], [-2.0, 1.0], [-3.0, 1.0]]
    # What is forgotten may fall onto one class.
    script = Scripted(objectives, [[0, 0], [10, 0], [10, 2], [10, 0]])
    learned = run_script(script, seen, Control(tasks=(1,), fraction=0.95))
    # At step 2 the second task has lost a tenth: learning ends, and step 1 is the result.
    assert learned.step == 1
    assert len(seen) == 3


def test_each_control_task_is_kept():
    seen: list[Progress] = []
    # The mean of the two stays over 0.95, but the second task falls to 0.9.
    script = Scripted([[1.0, 1.0], [0.5, 0.5], [0.2, 0.2]], [[2, 0], [0, 0], [0, 2]])
    learned = run_script(script, seen, Control(tasks=(0, 1), fraction=0.95))
    assert learned.step == 1


def test_callbacks():
    script = Scripted([[1.0, 1.0], [0.2, 0.2], [0.5, 0.5], [1.0, 1.1]], np.zeros((4, 2), int))
    best, snapshots, steps, old_steps, old_snapshots = [], [], [], [], []
    learned = run_script(script, steps, on_best=best.append, on_snapshot=snapshots.append)
    assert [one.step for one in best] == [0, 1] and best[-1] is learned
    assert [(one.step, one.ended) for one in snapshots] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
    ]
    with pytest.warns(DeprecationWarning, match="now on_step and on_snapshot"):
        run_script(script, [], report=old_steps.append, save=old_snapshots.append)
    assert [one.step for one in old_steps] == [one.step for one in steps] == [0, 1, 2, 3]
    assert [one.step for one in old_snapshots] == [0, 1, 2, 3]


def test_few_examples_choose_no_step():
    # Better than the start at steps 1 and 2, worse at step 3.
    script = Scripted([[1.0, 1.0], [0.2, 0.2], [0.5, 0.5], [1.0, 1.1]], np.zeros((4, 2), int))
    assert run_script(script, [], held_out=20).step == 1
    assert run_script(script, [], held_out=10).step == 2


def test_tasks_learn_from_each_others_examples(text_recipe, tmp_path):
    terms = [{"name": "logit_alignment", "options": {"cross_task": 0.5}}]
    recipe = parse_recipe(text_recipe | {"objectives": terms})
    inputs = learning_inputs(recipe, tmp_path)
    workspace = inputs.workspace
    batch = next(inputs.calibration.batches())
    backbone, heads = workspace.backbone, workspace.head_networks
    learner = learning.make_learner(
        forward_with_heads(backbone, list(heads.values()), cross_task=True),
        make_granularity("tensor", {}, inputs.shapes),
        CONSTRAINTS["clip"],
        list(build_objectives(recipe.objectives, recipe.tasks).values()),
        build_optimizer(recipe.learning.optimizer, 1),
    )
    frozen = Frozen(inputs.base, inputs.deltas, list(workspace.heads.values()))
    initial = make_granularity("tensor", {}, inputs.shapes).init(
        constant(inputs.shapes, inputs.experts, 0.3)
    )
    _, per_task = learner.step(learner.init(initial), frozen, batch)

    # The same by hand, one task after the other.
    scales = make_granularity("tensor", {}, inputs.shapes).scales(initial)
    merged = materialize_compiled(mix(inputs.base, inputs.deltas, scales))
    size = recipe.learning.batch_size
    for position, task in enumerate(recipe.tasks):

        def log_softmax(parameters, task=task):
            outputs = backbone(parameters, batch.inputs)
            logits = heads[task](workspace.heads[task], outputs)
            return torch.tensor(np.asarray(logits)).log_softmax(-1)

        said, wanted = log_softmax(merged), log_softmax(workspace.expert(task, inputs.base))
        losses = -(wanted.exp() * said).sum(-1)
        own = losses[position * size : (position + 1) * size]
        # An example of another task counts less if the expert is sure of it.
        losses = losses * -(wanted.exp() * wanted).sum(-1) / math.log(wanted.shape[-1])
        others = torch.cat([losses[: position * size], losses[(position + 1) * size :]])
        np.testing.assert_allclose(per_task[position], own.mean() + 0.5 * others.mean(), rtol=1e-4)
