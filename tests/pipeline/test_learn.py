"""From a recipe to learned coefficients: stages, attention heads, layers, forgetting."""

import weakref
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.learning.held_out import HeldOutMetrics
from adamerge_jax.learning.single_coefficient import CANDIDATES
from adamerge_jax.pipeline.baselines import baseline_rows
from adamerge_jax.pipeline.learn import LearningInputs, MergeResult, learn_coefficients
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import EvaluationRecipe
from tests.references import learning_inputs


class Seen(list):
    """What the learning loop reports, stage by stage: `(what, steps, [Progress, ...])`."""

    @contextmanager
    def watch(self, what: str, steps: int):
        """Of stages and steps, or of whatever else is counted up to a total."""
        self.append((what, steps, []))
        yield self[-1][2].append


def inputs_of(fields: dict[str, Any], folder, **changes: Any) -> LearningInputs:
    recipe = parse_recipe(fields | changes)
    return learning_inputs(recipe, folder)


def learned(fields: dict[str, Any], folder, seen: Seen, **changes: Any) -> MergeResult:
    return learn_coefficients(inputs_of(fields, folder, **changes), show_stage=seen.watch)


def test_fine_coefficients_start_from_coarse_ones(text_recipe, tmp_path):
    seen = Seen()
    merge = learned(
        text_recipe,
        tmp_path,
        seen,
        coefficients={"granularity": "row", "coarse": {"granularity": "layer", "steps": 4}},
    )
    assert [(what.partition(":")[0], steps) for what, steps, _ in seen] == [
        ("coarse", 4),
        ("learning", 3),
    ]
    best = [progress.best for progress in seen[0][2] if progress.best][-1]
    start = seen[1][2][0].best.values
    name = "bert.encoder.layer.*.output.dense.weight"
    layers = [best.values[f"bert.encoder.layer.{index}"] for index in range(len(start[name]))]
    layer = np.concatenate(layers)
    np.testing.assert_allclose(start[name], np.repeat(layer[..., None], 96, axis=2), rtol=1e-6)
    assert merge.coefficients.granularity == "row"


def test_one_task_has_no_other_to_ask_about(text_recipe, tmp_path):
    name, task = next(iter(text_recipe["tasks"].items()))
    chosen = text_recipe | {"tasks": {name: task}}
    chosen["objectives"] = [{"name": "logit_alignment", "options": {"cross_task": 0.6}}]
    seen = Seen()
    learned(chosen, tmp_path, seen)
    ((_, _, steps),) = seen
    start, *_, last = [progress.held_out.objective for progress in steps if progress.held_out]
    assert np.isfinite(last).all()
    assert not np.array_equal(start, last)


def test_heads_are_those_of_the_model(text_recipe, tmp_path):
    seen = Seen()
    merge = learned(text_recipe, tmp_path, seen, coefficients={"granularity": "head"})
    values = merge.coefficients.values
    assert values["bert.encoder.layer.0.attention.self.query.weight"].shape == (3, 4)
    assert values["bert.encoder.layer.0.attention.output.dense.weight"].shape == (3, 4)
    assert values["bert.encoder.layer.0.intermediate.dense.weight"].shape == (3,)
    heads = merge.coefficients.granularity_options["heads"]
    assert heads["*.attention.output.dense.weight"] == (1, 4)
    assert "by head" in seen[0][0]


@pytest.mark.parametrize(
    ("granularity", "options", "message"),
    [
        ("groups", {"patterns": {"a": ["*.absent.*"]}}, "fits no merged tensor"),
        ("chunk", {"pieces": {"*.absent.*": 4}}, "fits no merged tensor"),
        ("chunk", {"pieces": 10**6}, "cannot be cut into 1000000 pieces"),
        ("singular", {"rank": 97}, "fewer than rank 97"),
        ("groups", {}, "missing a required argument: 'patterns'"),
    ],
)
def test_granularities_that_do_not_fit(text_recipe, tmp_path, granularity, options, message):
    chosen = {"granularity": granularity, "granularity_options": options}
    with pytest.raises(InputError, match=message) as caught:
        inputs_of(text_recipe, tmp_path, coefficients=chosen)
    assert "\n" not in str(caught.value)


def test_a_budget_that_is_too_small(text_recipe, tmp_path):
    chosen = {
        "granularity": "importance_chunk",
        "granularity_options": {"budget": 10},
        "coarse": {"steps": 1},
    }
    with pytest.raises(InputError, match=r"budget: 10 is under .* raise it to at least 201"):
        inputs_of(text_recipe, tmp_path, coefficients=chosen)


def test_layers_that_the_model_does_not_have(text_recipe, tmp_path):
    term = {"name": "hidden_state_alignment", "options": {"layers": [5]}}
    with pytest.raises(InputError, match=r"layer 5 .* layers 0 \(the embeddings\) to 4"):
        inputs_of(text_recipe, tmp_path, objectives=[term])
    term["options"] = {"layers": [-5, 4]}
    inputs_of(text_recipe, tmp_path, objectives=[term])


def test_forgetting_a_task(text_recipe, tmp_path):
    objectives = [
        {"name": "logit_alignment", "weight": {"mood": -1}},
        {"name": "logit_alignment", "weight": {"tone": 1, "topic": 1}},
    ]
    seen = Seen()
    learned(
        text_recipe,
        tmp_path,
        seen,
        objectives=objectives,
        learning={
            "control": 0.9,
            "steps": 10,
            "evaluate_every": 2,
            "batch_size": 4,
            "held_out": 0.5,
            "optimizer": {"learning_rate": 0.02},
        },
    )
    _, _, progress = seen[0]
    evaluations: list[HeldOutMetrics] = [p.held_out for p in progress if p.held_out is not None]
    # What the objective is for is forgotten, by raising the loss; the others are kept.
    kept = [p for p in progress if p.best is not None][-1].held_out
    position = list(text_recipe["tasks"]).index("mood")
    assert kept.objective[position] < evaluations[0].objective[position] < 0
    others = [k for k in range(3) if k != position]
    assert kept.agreement[others].mean() >= 0.9 * evaluations[0].agreement[others].mean()


def test_two_experts_are_never_in_memory(image_recipe, tmp_path, monkeypatch):
    """Neither while they are asked for targets nor while they are evaluated."""
    read, expert_of = [], Workspace.expert

    def expert(workspace: Workspace, task: str, base: Any) -> Any:
        assert all(array() is None for array in read)
        parameters = expert_of(workspace, task, base)
        read.extend(map(weakref.ref, parameters.values()))
        return parameters

    monkeypatch.setattr(Workspace, "expert", expert)
    objectives = [{"name": "logit_alignment", "options": {"cross_task": 0.1}}]
    inputs = inputs_of(image_recipe, tmp_path, objectives=objectives)
    asked = len(read)
    baseline_rows(inputs, EvaluationRecipe())
    assert len(read) == 2 * asked > 0
    assert all(array() is None for array in read)


def test_the_initial_value_is_the_one_with_the_lowest_objective(image_recipe, tmp_path):
    def merge(initial: Any, seen: Seen, tried: Seen) -> MergeResult:
        changes = {
            "coefficients": {"constraint": "free", "initial": initial},
            "learning": image_recipe["learning"] | {"steps": 1},
        }
        inputs = inputs_of(image_recipe, tmp_path, **changes)
        return learn_coefficients(inputs, show_stage=seen.watch, show_count=tried.watch)

    def objective(initial: float) -> float:
        seen, tried = Seen(), Seen()
        merge(initial, seen, tried)
        assert not tried
        return float(seen[0][2][0].held_out.objective.sum())

    tried = Seen()
    chosen = merge("auto", Seen(), tried).coefficients.initial
    words = "trying the initial coefficient {:g}: held-out examples"
    assert {words.format(chosen), words.format(0.3)} <= {shown for shown, _, _ in tried}
    assert all(counts[-1] == total > 0 for _, total, counts in tried)
    position = CANDIDATES.index(chosen)
    around = CANDIDATES[max(position - 1, 0) : position + 2]
    assert min(around, key=objective) == chosen


def test_heads_are_fitted_to_few_copies(image_recipe, tmp_path, monkeypatch):
    fitted = {}

    def fit(workspace, parameters, calibration, kind, seed):
        for task, examples in calibration.examples.items():
            fitted[task] = len(examples), len(calibration.targets[task].expert_logits)
        return {}

    monkeypatch.setattr("adamerge_jax.pipeline.learn.fit_heads", fit)
    monkeypatch.setattr("adamerge_jax.pipeline.learn.MOST_TO_FIT", 59)
    objectives = [{"name": "logit_alignment"}]
    learning = image_recipe["learning"] | {"steps": 20, "copies": 3}
    chosen = {"heads": "refitted", "objectives": objectives, "learning": learning}
    learned(image_recipe, tmp_path, Seen(), **chosen)
    assert fitted == dict.fromkeys(image_recipe["tasks"], (40, 40))  # 20 images, and a copy of each


@pytest.mark.parametrize("kind", ["image_recipe", "text_recipe"])
def test_copies_are_learned_from_and_not_judged_by(kind, request, tmp_path):
    recipe = request.getfixturevalue(kind)
    plain = inputs_of(recipe, tmp_path).calibration
    learning = recipe["learning"] | {"copies": 2, "steps": 100}
    copied = inputs_of(recipe, tmp_path, learning=learning).calibration
    for task, index in plain.learning.items():
        assert len(copied.learning[task]) == 3 * len(index)
        assert copied.held_out[task].tolist() == plain.held_out[task].tolist()
        assert set(copied.learning[task] % len(plain.examples[task])) == set(index)


def test_copies_are_no_more_than_steps_draw(text_recipe, tmp_path):
    def copies(steps: int) -> dict[str, int]:
        learning = text_recipe["learning"] | {"copies": 2, "steps": steps}
        examples = inputs_of(text_recipe, tmp_path, learning=learning).calibration.examples
        return {task: data.copies for task, data in examples.items()}

    size = len(inputs_of(text_recipe, tmp_path).calibration.examples["tone"])
    batch = text_recipe["learning"]["batch_size"]
    assert set(copies(1).values()) == {0}
    assert set(copies(-(-2 * size // batch)).values()) == {1}
    assert set(copies(-(-9 * size // batch)).values()) == {2}
