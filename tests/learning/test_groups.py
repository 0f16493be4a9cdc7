"""Tasks with the same head and objective are evaluated together, as they would be one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import ViTConfig

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, tensor
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.forward import TaskGroup, forward_with_heads
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.objectives import (
    Targets,
    TaskOutputs,
    hidden_state_alignment,
    logit_alignment,
    weighted_sum,
)
from adamerge_jax.objectives.targets import CrossTaskTargets
from adamerge_jax.task_vectors import DenseDelta

CONFIG = dict(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=4,
    patch_size=2,
    num_channels=1,
)
LAYER, EXAMPLES = 1, 4


def learner_of(classes: list[int]):
    """A learner for experts with so many classes, its state, its frozen arrays and a batch."""
    generator = np.random.default_rng(0)
    configs = [ViTConfig(num_labels=count, **CONFIG) for count in classes]
    family = family_of(configs[0])
    backbone = family.build_backbone(configs[0])
    heads = [family.build_head(config) for config in configs]

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    base = {name: draw(*leaf.shape) for name, leaf in backbone.shapes.items()}
    deltas = {
        name: DenseDelta(0.1 * draw(*leaf.shape[:1], len(heads), *leaf.shape[1:]))
        if "*" in name
        else DenseDelta(0.1 * draw(len(heads), *leaf.shape))
        for name, leaf in backbone.shapes.items()
    }
    head_parameters = [{n: draw(*leaf.shape) for n, leaf in head.shapes.items()} for head in heads]
    others = len(heads) - 1
    targets = [
        Targets(
            expert_logits=draw(EXAMPLES, count),
            expert_hidden_states={LAYER: draw(EXAMPLES, 5, 8)},
            cross_task=CrossTaskTargets(
                draw(EXAMPLES, others, count), np.ones((EXAMPLES, others), np.float32)
            ),
        )
        for count in classes
    ]
    aligned, states = logit_alignment(cross_task=0.6), hidden_state_alignment(layers=[LAYER])
    both, alone = weighted_sum([(1.0, aligned), (0.5, states)]), weighted_sum([(2.0, aligned)])
    # The last task has an objective of its own, whatever its head.
    objectives = [both] * others + [alone]
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    granularity = tensor(shapes)
    batch = Batch(
        {"pixel_values": draw(len(heads) * EXAMPLES, 1, 4, 4)},
        np.abs(draw(len(heads), EXAMPLES)),
        targets,
    )

    def make(forward):
        learner = make_learner(
            forward, granularity, CONSTRAINTS["free"], objectives, optax.sgd(0.1)
        )
        return learner, learner.init(granularity.init(constant(shapes, len(heads), 0.3)))

    return make, backbone, heads, Frozen(base, deltas, head_parameters), batch


def one_by_one(backbone, heads):
    """A forward function that returns the outputs of each task, the plain way."""

    def forward(parameters, head_parameters, inputs):
        outputs = backbone(parameters, inputs, hidden_states=True)
        by_task = []
        for task, (head, stored) in enumerate(zip(heads, head_parameters, strict=True)):
            chosen = slice(task * EXAMPLES, (task + 1) * EXAMPLES)
            logits = head(complete_head(head, stored, parameters), outputs)
            rest = [
                logits[other * EXAMPLES : (other + 1) * EXAMPLES]
                for other in range(len(heads))
                if other != task
            ]
            by_task.append(
                TaskOutputs(
                    logits[chosen],
                    {LAYER: outputs.hidden_states[LAYER][chosen]},
                    cross_task_logits=jnp.stack(rest, axis=1),
                )
            )
        return by_task

    return forward


def test_groups_learn_what_single_tasks_do():
    classes = [2, 3, 2, 2, 3]
    make, backbone, heads, frozen, batch = learner_of(classes)
    grouped = forward_with_heads(backbone, heads, [LAYER], cross_task=True)
    groups: list[TaskGroup | TaskOutputs] = []
    jax.eval_shape(
        lambda *arguments: groups.extend(grouped(*arguments)),
        frozen.base,
        frozen.heads,
        batch.inputs,
    )
    assert all(isinstance(group, TaskGroup) for group in groups)
    assert len(groups) == len(set(classes))
    results = []
    for forward in (grouped, one_by_one(backbone, heads)):
        learner, state = make(forward)
        evaluation = learner.evaluate(state, frozen, batch)
        state, objective = learner.step(state, frozen, batch)
        results.append((objective, learner.coefficients(state), evaluation.objective))
        np.testing.assert_array_equal(
            np.concatenate(evaluation.predicted),
            np.concatenate(results[0][3] if len(results) > 1 else evaluation.predicted),
        )
        results[-1] += (evaluation.predicted,)
    jax.tree.map(
        lambda mine, plain: np.testing.assert_allclose(mine, plain, rtol=2e-5, atol=2e-6),
        *(result[:3] for result in results),
    )


def test_many_experts_make_no_longer_program():
    lines = []
    for experts in (2, 64):
        make, backbone, heads, frozen, batch = learner_of([3] * experts)
        learner, state = make(forward_with_heads(backbone, heads, [LAYER], cross_task=True))
        lines.append(learner.step.lower(state, frozen, batch).as_text().count("\n"))
    assert lines[1] < 1.3 * lines[0]
