"""Batches in parts, against the whole batch."""

from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from adamerge_jax.data.batches import Batch
from adamerge_jax.errors import InputError
from adamerge_jax.learning.microbatches import split
from adamerge_jax.objectives import CrossTaskTargets, Targets
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import learning_inputs

SINGULAR = {"granularity": "singular", "granularity_options": {"rank": 2}}


def test_every_part_has_its_share_of_every_task():
    tasks, size = 3, 4
    # Of every example: its task, its place in the task.
    rows = np.array([[task, place] for task in range(tasks) for place in range(size)])
    by_task = [rows[task * size : (task + 1) * size] for task in range(tasks)]
    targets = []
    for task, task_rows in enumerate(by_task):
        others = np.stack([by_task[k] for k in range(tasks) if k != task], axis=1)
        targets.append(Targets(task_rows, cross_task=CrossTaskTargets(others, others[..., 1])))
    weights = np.arange(tasks * size).reshape(tasks, size)
    parts = split(Batch({"x": rows}, weights, targets, {"x": rows}), 2)
    for number, places in enumerate([(0, 1), (2, 3)]):
        part = jax.tree.map(itemgetter(number), parts)
        expected = [[task, place] for task in range(tasks) for place in places]
        np.testing.assert_array_equal(part.inputs["x"], expected)
        np.testing.assert_array_equal(part.augmented_inputs["x"], expected)
        np.testing.assert_array_equal(part.weights, weights[:, list(places)])
        for task, cut in enumerate(part.targets):
            of_task = [row for row in expected if row[0] == task]
            np.testing.assert_array_equal(cut.expert_logits, of_task)
            others = [[[k, place] for k in range(tasks) if k != task] for place in places]
            np.testing.assert_array_equal(cut.cross_task.expert_logits, others)
            places_of_others = [[place] * (tasks - 1) for place in places]
            np.testing.assert_array_equal(cut.cross_task.weights, places_of_others)
            assert cut.labels is None


def learned(fields: dict[str, Any], folder: Path, microbatches: int) -> dict[str, np.ndarray]:
    learning = {"steps": 3, "batch_size": 4, "microbatches": microbatches}
    learning |= {"optimizer": {"name": "sgd", "learning_rate": 0.01}}
    recipe = parse_recipe(
        fields
        | {"learning": learning, "regularizers": [{"name": "distance", "weight": 0.1}]}
        | {"objectives": [{"name": "logit_alignment", "options": {"cross_task": 0.5}}]}
    )
    inputs = learning_inputs(recipe, folder)
    watch = lambda *_: nullcontext(lambda progress: None)  # noqa: E731
    return dict(learn_coefficients(inputs, show_stage=watch).values)


def test_coefficients_are_those_of_the_whole_batch(image_recipe, tmp_path):
    whole, parts = (learned(image_recipe, tmp_path, count) for count in (1, 2))
    moved = 0.0
    for name, values in parts.items():
        # Sums over examples in another order.
        np.testing.assert_allclose(values, whole[name], atol=1e-6, err_msg=name)
        moved = max(moved, np.abs(values - 0.3).max())
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning": {"batch_size": 4, "microbatches": 3}}, r"learning\.microbatches: 3 equal"),
        (
            {
                "learning": {"batch_size": 4, "microbatches": 2},
                "objectives": [{"name": "pseudo_labels"}],
            },
            r"learning\.microbatches: pseudo_labels",
        ),
        (
            {"task_vectors": {"dtype": "int8"}, "coefficients": SINGULAR},
            r"task_vectors\.dtype: int8 has a step for each row, .* 'singular'",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(image_recipe, changes, message):
    with pytest.raises(InputError, match=message):
        parse_recipe(image_recipe | changes)


def test_parts_that_do_not_come_out_even():
    batch = Batch({"x": np.zeros((8, 2))}, np.ones((2, 4)), [Targets()] * 2)
    with pytest.raises(InputError, match=r"3 microbatches .* choose a number that divides 4"):
        split(batch, 3)
