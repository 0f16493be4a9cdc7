"""Learning, against a plain PyTorch loop and against its own promises."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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

from adamerge_jax import learning
from adamerge_jax.calibration import Calibration, calibrate
from adamerge_jax.coefficients import CONSTRAINTS, GRANULARITIES, Granularity, unstack_values
from adamerge_jax.data import load_examples
from adamerge_jax.learning import Frozen, Learner, NonFiniteObjectiveError, Progress
from adamerge_jax.loading import load_head, load_task_vectors, load_trunk, open_models
from adamerge_jax.objectives import OBJECTIVES
from adamerge_jax.recipes import parse_recipe
from tests.references import bert_tokenizer, edit_weights

STEPS = 20
BATCH_SIZE = 4


class Setup(NamedTuple):
    """All that `learning.learn` is given."""

    granularity: Granularity
    learner: Learner
    frozen: Frozen
    calibration: Calibration

    def learn(self, initial: float = 0.3, steps: int = STEPS, evaluate_every: int = 5, **options):
        return learning.learn(
            self.learner,
            self.frozen,
            self.granularity.init(len(self.calibration.examples), initial),
            self.calibration,
            steps=steps,
            evaluate_every=evaluate_every,
            **options,
        )


def prepare(
    fields: dict[str, Any],
    folder: Path,
    *,
    granularity: str = "tensor",
    constraint: str = "clip",
    objective: str = "entropy",
    **optimizer: Any,
) -> Setup:
    recipe = parse_recipe(fields | {"learning": {"optimizer": optimizer}})
    models = open_models(recipe, folder)
    deltas, _ = load_task_vectors(models, None)
    heads = {
        task: models.family.build_head(expert.checkpoint.config)
        for task, expert in models.experts.items()
    }
    granularity_ = GRANULARITIES[granularity]({name: models.shapes[name] for name in deltas})
    learner = learning.make_learner(
        learning.forward_with_heads(models.family.build_trunk(models.config), list(heads.values())),
        granularity_,
        CONSTRAINTS[constraint],
        OBJECTIVES[objective],
        recipe.learning.optimizer.build(),
    )
    base = load_trunk(models, models.base, None)
    frozen = Frozen(base, deltas, [load_head(models, task) for task in heads])
    examples = {
        task: load_examples(
            task_recipe.calibration,
            root=folder,
            inputs=models.family.inputs,
            preprocessor=bert_tokenizer(folder),
            max_length=32,
            seed=0,
            name=task,
        )
        for task, task_recipe in recipe.tasks.items()
    }
    calibration = calibrate(examples, batch_size=BATCH_SIZE, held_out=0.2, seed=recipe.seed)
    return Setup(granularity_, learner, frozen, calibration)


def ask_experts(experts: list[PreTrainedModel], calibration: Calibration) -> Calibration:
    """Adds what each task's expert says of its examples."""
    logits = {}
    for expert, (task, examples) in zip(experts, calibration.examples.items(), strict=True):
        inputs = examples.take(np.arange(len(examples)), 16)
        logits[task] = expert(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
    return calibration._replace(expert_logits=logits)


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
            if batch.expert_logits:
                weights = torch.from_numpy(batch.expert_logits[position]).softmax(-1)
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
    setup = prepare(fields, tmp_path, granularity=granularity, objective=objective)
    auto_class, prefix = {
        "text": (AutoModelForSequenceClassification, "bert."),
        "image": (AutoModelForImageClassification, "vit."),
    }[model]
    experts = [
        auto_class.from_pretrained(task["expert"]).eval().requires_grad_(False)
        for task in fields["tasks"].values()
    ]
    if objective == "logit_alignment":
        setup = setup._replace(calibration=ask_experts(experts, setup.calibration))

    state = setup.learner.init(setup.granularity.init(len(fields["tasks"]), initial))
    objectives = []
    for batch in islice(setup.calibration.batches(), STEPS):
        state, per_task = setup.learner.step(state, setup.frozen, batch)
        objectives.append(per_task)
    learned = unstack_values(setup.learner.coefficients(state))

    own = type(experts[0].base_model).from_pretrained(fields["base"]).state_dict()
    shared = experts[0].state_dict()
    base = {prefix + name: array for name, array in own.items() if prefix + name in shared}
    expected, losses = pytorch_loop(experts, base, setup.calibration, granularity, initial)
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


def test_the_best_look_is_returned_and_never_worse_than_the_start(text_recipe, tmp_path):
    # Far too large a step: held-out entropy goes up and down.
    setup = prepare(text_recipe, tmp_path, granularity="task", name="sgd", learning_rate=3.0)
    seen: list[Progress] = []
    learned = setup.learn(steps=12, evaluate_every=2, report=seen.append)
    assert [progress.step for progress in seen] == list(range(13))
    assert seen[0].per_task is None
    assert all(progress.per_task.shape == (3,) for progress in seen[1:])
    looks = {p.step: p.held_out.sum() for p in seen if p.held_out is not None}
    assert list(looks) == [0, 2, 4, 6, 8, 10, 12]
    # Every step is the same compiled function.
    assert setup.learner.step._cache_size() == setup.learner.evaluate._cache_size() == 1
    best = min(looks, key=looks.get)
    assert learned.step == best
    assert learned.held_out.sum() == looks[best] <= looks[0]
    # The objective of the returned coefficients, computed anew.
    state = setup.learner.init(learned.values)
    batches = setup.calibration.held_out_batches()
    again = sum(setup.learner.evaluate(state, setup.frozen, batch) for batch in batches)
    np.testing.assert_allclose(again, learned.held_out, rtol=1e-5)


def test_the_start_is_returned_when_nothing_is_better(text_recipe, tmp_path):
    setup = prepare(text_recipe, tmp_path, learning_rate=0.02)

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
    learned = uphill.learn(steps=6, evaluate_every=3, report=seen.append)
    assert seen[-1].held_out.sum() > seen[0].held_out.sum()
    assert learned.step == 0
    assert all((values == np.float32(0.3)).all() for values in learned.values.values())


def test_same_seed_same_coefficients_bit_for_bit(text_recipe, tmp_path):
    setups = [prepare(text_recipe, tmp_path, learning_rate=0.02) for _ in range(2)]
    first, second = (setup.learn(steps=4) for setup in setups)
    assert first.step == second.step
    for group, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[group])
    other_seed = setups[0].calibration._replace(seed=1)
    other = setups[0]._replace(calibration=other_seed).learn(steps=4)
    assert any((values != other.values[group]).any() for group, values in first.values.items())


def test_divergence_keeps_the_best_so_far(text_recipe, tmp_path):
    setup = prepare(
        text_recipe, tmp_path, granularity="task", constraint="free", learning_rate=1e30
    )
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
    setup = prepare(text_recipe, tmp_path, granularity="task")
    with pytest.raises(NonFiniteObjectiveError, match=r"step 0, task 'mood': .*held-out") as caught:
        setup.learn()
    assert caught.value.learned is None
