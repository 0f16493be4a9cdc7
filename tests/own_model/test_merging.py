"""Models in memory are merged by the learner, the presets and the registries of recipes."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import adamerge_jax as am
from adamerge_jax.learning.loop import Progress
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.own_model.data import name_experts
from adamerge_jax.own_model.progress import show_line
from adamerge_jax.recipes.build import build_objectives
from adamerge_jax.recipes.presets import PRESETS
from tests.own_model.linear import BASE, DATA, EXPERTS, INPUTS, LABELLED, QUICK, TASKS, forward


def test_it_learns_as_the_recommended_preset_says(merged: am.Merged[dict[str, Any]]):
    fields = PRESETS["recommended"]["coefficients"]
    learned = merged.coefficients
    assert (learned.granularity, learned.granularity_options) == ("column", {"axis": -1})
    assert learned.constraint == fields["constraint"]
    assert learned.values["body.kernel"].shape == (2, 5)
    assert learned.objective.startswith("logit_alignment")
    assert merged.recipe.learning.optimizer.schedule == "cosine_decay_schedule"
    start, *_ = steps = merged.stages[-1]
    kept = next(step for step in steps if step.step == learned.step)
    assert sum(kept.held_out.values()) <= sum(start.held_out.values())


def test_it_is_the_learner_of_the_core():
    """The same coefficients, bit for bit, as by the functions that the guide tells of."""
    options = {"constraint": "clip", "initial": 0.4, "steps": 6, "batch_size": 8, "seed": 3}
    made = am.merge(
        BASE,
        EXPERTS,
        forward,
        LABELLED,
        preset="atlas",
        granularity="tensor",
        objectives="cross_entropy",
        progress=False,
        **options,
    )
    flat = {"body.kernel": BASE["body"]["kernel"], "body.bias": BASE["body"]["bias"]}
    flat["out.kernel"] = BASE["out"]["kernel"]
    experts = [
        {name: expert[name.split(".")[0]][name.split(".")[1]] for name in flat}
        for expert in EXPERTS.values()
    ]
    deltas = am.task_vectors(flat, experts)
    granularity = am.granularities.tensor(shapes := am.granularities.shapes_of(flat, deltas))

    def core_forward(parameters, heads, inputs):
        tree = am.materialize(parameters)
        nested = {"body": {"kernel": tree["body.kernel"], "bias": tree["body.bias"]}}
        logits = forward(nested | {"out": {"kernel": tree["out.kernel"]}}, inputs["inputs"])
        return [am.objectives.TaskOutputs(part) for part in jnp.split(logits, 2)]

    learned = am.learn(
        am.make_learner(
            core_forward,
            granularity,
            am.CONSTRAINTS["clip"],
            list(build_objectives(made.recipe.objectives, TASKS).values()),
            build_optimizer(made.recipe.learning.optimizer, 6),
        ),
        am.Frozen(flat, deltas, heads=()),
        granularity.init(am.granularities.constant(shapes, experts=2, value=0.4)),
        am.calibrate(
            {task: am.ArrayExamples({"inputs": x}, labels=y) for task, (x, y) in LABELLED.items()},
            batch_size=8,
            held_out=made.recipe.learning.held_out,
            seed=3,
        ),
        steps=6,
        evaluate_every=1,
    )
    assert learned.step == made.coefficients.step > 0
    for group, values in learned.values.items():
        assert (values[0] == made.coefficients.values[group]).all()


def test_the_merge_is_the_sum_that_coefficients_say(merged: am.Merged[dict[str, Any]]):
    base, scale = np.asarray(BASE["body"]["kernel"], float), merged.coefficients.values
    expected = base + sum(
        scale["body.kernel"][k] * (np.asarray(expert["body"]["kernel"], float) - base)
        for k, expert in enumerate(EXPERTS.values())
    )
    np.testing.assert_allclose(merged.parameters["body"]["kernel"], expected, atol=1e-6)
    assert merged.parameters["steps"] is not None and int(merged.parameters["steps"]) == 7


def test_experts_and_data_may_be_lists():
    experts, data = list(EXPERTS.values()), list(DATA.values())
    assert name_experts(experts, data)[0].keys() == {"expert_0", "expert_1"}
    for named in (name_experts(experts, DATA), name_experts(EXPERTS, data)):
        assert list(named[0]) == list(named[1]) == list(TASKS)
    turned = name_experts(EXPERTS, dict(reversed(DATA.items())))
    assert list(turned[1]) == list(TASKS)


def test_heads_are_each_tasks_own_and_may_have_other_classes():
    four = jax.random.normal(jax.random.key(0), (5, 4))
    experts = {**EXPERTS, "law": EXPERTS["law"] | {"out": {"kernel": four}}}
    options = QUICK | {"head_parameters": ["out.*"], "steps": 10}
    learned = am.merge(BASE, experts, forward, DATA, **options)
    assert list(learned.coefficients.shapes) == ["body.bias", "body.kernel"]
    assert (learned.parameters["out"]["kernel"] == BASE["out"]["kernel"]).all()
    head = learned.for_task("law")["out"]["kernel"]
    assert head.shape == (5, 4) and (head != four).any()
    folded = am.fold(BASE, experts, learned.coefficients, task="law", head_parameters=["out.*"])
    assert (folded["out"]["kernel"] == head).all()


def test_stacked_layers_have_coefficients_of_their_own():
    layers = jnp.stack([BASE["body"]["kernel"][:5, :5]] * 3)
    base = {"layers": {"*": {"kernel": layers}}}
    # No expert changes layer 1.
    experts = [{"layers": {"*": {"kernel": layers.at[::2].add(size)}}} for size in (0.1, 0.2)]

    def scanned(parameters, inputs):
        def layer(x, kernel):
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(layer, inputs, parameters["layers"]["*"]["kernel"])[0]

    made = am.merge(
        base,
        experts,
        scanned,
        [INPUTS[:, :5]] * 2,
        granularity="tensor",
        interference="elect_sign",
        steps=2,
        progress=False,
    )
    assert list(made.coefficients.values) == ["layers.0.kernel", "layers.2.kernel"]
    merged_layers = made.parameters["layers"]["*"]["kernel"]
    assert (merged_layers[1] == layers[1]).all() and (merged_layers[0] != layers[0]).any()


def test_a_merge_starts_from_a_file(merged: am.Merged[dict[str, Any]], tmp_path: Path):
    file = merged.save(tmp_path / "coefficients.safetensors")
    options = {"steps": 1, "learning_rate": 1e-9, "progress": False}
    second = am.merge(BASE, EXPERTS, forward, DATA, start=file, **options)
    for group, values in second.coefficients.values.items():
        np.testing.assert_allclose(values, merged.coefficients.values[group], atol=1e-6)
    assert second.coefficients.started_from == str(file)


def test_test_data_give_a_table(tmp_path: Path):
    labels = {task: np.asarray(forward(EXPERTS[task], INPUTS).argmax(-1)) for task in TASKS}
    test = {task: (INPUTS, labels[task]) for task in TASKS}
    options = QUICK | {"test": test, "head_parameters": ["out.*"], "heads": "kept"}
    made = am.merge(BASE, EXPERTS, forward, DATA, **options)
    rows = {row.method: row for row in made.results.rows}
    names = ["base", "experts (one model each)", "average", "task arithmetic (0.3)"]
    assert list(rows) == [*names, "learned (task)"]

    def accuracy(model: Any, task: str) -> float:
        return float((forward(model, INPUTS).argmax(-1) == labels[task]).mean())

    for task in TASKS:
        head = made.for_task(task)["out"]["kernel"]
        assert (head == EXPERTS[task]["out"]["kernel"]).all()
        assert rows["experts (one model each)"].tasks[task] == 1.0
        of_merge = accuracy(made.for_task(task), task)
        assert rows["learned (task)"].tasks[task] == pytest.approx(of_merge)
        # A merge without learning has the expert's own head.
        halves = [EXPERTS[other]["body"] for other in TASKS]
        body = jax.tree.map(lambda one, other: (one + other) / 2, *halves)
        average = EXPERTS[task] | {"body": body}
        assert rows["average"].tasks[task] == pytest.approx(accuracy(average, task))
    assert "accuracy" in repr(made) and "experts 100.0%" in repr(made)
    page = made.report(tmp_path / "report").read_text()
    assert "The merge beside the experts" in page and "what the merge says across" in page
    assert "2 experts of a model in memory" in page


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": []}, "experts: there are none"),
        ({"experts": BASE["out"]["kernel"]}, "experts: is ArrayImpl"),
        ({"experts": [EXPERTS["law"]]}, "data: is of 2 tasks, and there are 1 experts"),
        ({"data": INPUTS}, "data: is ndarray"),
        ({"data": {"law": INPUTS, "art": INPUTS}}, "data: 'medicine' is missing"),
        ({"data": [INPUTS, "x"]}, "data: 'medicine' is str ('x'), expected an array"),
        ({"data": [INPUTS, INPUTS * np.nan]}, "data: 'medicine': row 0 holds a number that is NaN"),
        ({"data": [(INPUTS, INPUTS), INPUTS]}, "labels of 'law' are float32"),
        ({"data": [(INPUTS, [9] * 40), INPUTS]}, "'law' has the label 9, and forward gives 3"),
        ({"data": [INPUTS, INPUTS[:, :2]]}, "has shape (6,) in task 'law' and (2,) in task"),
        ({"base": jnp.ones(3)}, "base: is a single array"),
        ({"base": {"f": jax.nn.relu}}, "base: no leaf of this dict is a floating-point array"),
        ({"forward": lambda p, x: x.sum()}, "forward: returned shape () for 2 examples"),
        ({"forward": lambda p, x: x > 0}, "forward: returned bool"),
        ({"forward": lambda p, x: None}, "forward: returned NoneType"),
        ({"granularity": "rows"}, "coefficients.granularity: found 'rows'"),
        ({"objectives": "cross_entropy"}, "data: 'law' has no labels"),
        ({"objectives": "pseudo_labels"}, "pseudo_labels changes images and texts"),
        ({"preset": "expert-merging"}, "forward: an objective asks for the hidden states"),
        ({"preset": "best"}, "preset: found 'best'"),
        ({"keep_from_base": ["x"]}, "keep_from_base: 'x' fits no parameter"),
        ({"head_parameters": ["x"]}, "head_parameters: 'x' fits no parameter"),
        ({"heads": "learned"}, "head_parameters: is missing"),
        ({"heads": "refitted"}, "take learned or kept"),
        ({"steps": 0}, "learning.steps: found 0"),
        ({"batch_size": 64}, "lower learning.batch_size"),
        ({"recipe": {"export": {}}}, "merge: recipe has 'export'"),
        ({"test": DATA}, "test: 'law' has no class for each example"),
        ({"test": {"law": LABELLED["law"]}}, "test: is of 1 tasks, and there are 2 experts"),
        ({"test": [(INPUTS, [0] * 39 + [-100])] * 2}, "test: 'law' has the label -100 in row 39"),
        ({"test": [(INPUTS, [5] * 40)] * 2}, "test: 'law' has the label 5, and forward gives 3"),
        ({"recipe": {"learning": {"copies": 2}}}, "merge: learning.copies"),
        ({"recipe": {"learning": {"step": 2}}}, "unknown field learning.step"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(changed: dict[str, Any], message: str):
    given = {"base": BASE, "experts": EXPERTS, "forward": forward, "data": DATA}
    with pytest.raises(am.InputError) as caught:
        am.merge(**(given | QUICK | changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["force_terminal", "force_jupyter"])
def test_a_quiet_console_has_no_line(kind: str, capsys):
    with show_line(4, Console(quiet=True, file=io.StringIO(), **{kind: True})) as on_step:
        on_step(Progress(2, np.array([0.25, 0.5]), None, 0.1))
    assert capsys.readouterr().out == ""


def test_the_line_in_a_terminal_has_the_time_left():
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    with show_line(4, console) as on_step:
        on_step(Progress(0, None, None, 0.1))
        on_step(Progress(2, np.array([0.25, 0.5]), None, 0.1))
    shown = console.export_text()
    assert "2/4" in shown and "loss 0.750" in shown and "left" in shown
