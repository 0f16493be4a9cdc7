"""The account of a merge: what becomes of every tensor of the base."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from adamerge_jax.checkpoints.diffusion import Pipeline, component_of
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, differs
from adamerge_jax.pipeline.models import Models

NAMED = 3
"""Tensors, at most, that a line names."""


def account(models: Models, mixed: Iterable[str]) -> list[str]:
    """Returns lines that together speak of all tensors of the base's files.

    Args:
        models: The base and its experts.
        mixed: The names without `*` of the tensors that coefficients mix; those that
            `keep_from_base` keeps may be among them.
    """
    merged = set(mixed) - models.kept_from_base
    pipeline = models.base.checkpoint
    if not isinstance(pipeline, Pipeline):
        return [*_account_of(models, merged), *models.notes]
    lines = []
    for component in pipeline.components:
        part = _part(models, component)
        of_part = _account_of(part, {name for name in merged if name in part.base.names})
        lines += [f"{component}: {line}" for line in of_part + _unchanged(part)]
    if pipeline.copied:
        lines.append(f"copied from the base: {', '.join(pipeline.copied)}")
    for task, expert in models.experts.items():
        components = {component_of(name) for name in expert.checkpoint.tensors}
        if further := components - pipeline.components.keys():
            names = ", ".join(sorted(further))
            lines.append(f"left out, expert {task!r} alone has them: {names}")
    return [*lines, *models.notes]


def _part(models: Models, component: str) -> Models:
    """Returns the models with one component of their pipelines alone."""

    def part_of(model: MatchedCheckpoint) -> MatchedCheckpoint:
        tensors = model.checkpoint.tensors
        return dataclasses.replace(
            model,
            checkpoint=dataclasses.replace(
                model.checkpoint,
                tensors={n: info for n, info in tensors.items() if component_of(n) == component},
            ),
            names={n: f for n, f in model.names.items() if component_of(n) == component},
            extra=tuple(name for name in model.extra if component_of(name) == component),
        )

    experts = {task: part_of(expert) for task, expert in models.experts.items()}
    return dataclasses.replace(models, base=part_of(models.base), experts=experts)


def _unchanged(part: Models) -> list[str]:
    """Returns a line about the experts whose component has the base's weights."""
    tasks = [
        task
        for task, expert in part.experts.items()
        if expert.names and not differs(expert, part.base, sorted(expert.names))
    ]
    names = ", ".join(map(repr, tasks))
    return [f"the base's weights in {names}"] if tasks else []


def _account_of(models: Models, merged: Collection[str]) -> list[str]:
    """Returns the account of one model, or of one component of a pipeline."""
    base, in_files = models.base, models.base.checkpoint.tensors
    size = sum(int(np.prod(base.shape(name))) for name in merged)
    lines = [f"{len(merged)} of {len(in_files)} tensors merged ({size / 1e6:.1f} M parameters)"]
    left = [name for name in base.names if name not in merged]
    for task, expert in models.experts.items():
        lacking = [name for name in left if name not in expert.names]
        if lacking:
            lines.append(f"as in the base, expert {task!r} lacks them: {_named(lacking)}")
        left = [name for name in left if name in expert.names]
    kept = [name for name in left if name in models.kept_from_base]
    if kept:
        lines.append(f"as in the base (keep_from_base): {_named(kept)}")
    unchanged = [name for name in left if name not in models.kept_from_base]
    if unchanged:
        lines.append(f"as in the base, not merged: {_named(unchanged)}")
    replaced = models.replaced
    carried = [name for name in base.extra if name not in replaced]
    if carried:
        lines.append(f"as in the base, no parameters that experts share: {_named(carried)}")
    if replaced:
        lines.append(f"not in the merge, each task has its own: {_named(replaced)}")
    spoken_of = {*base.names.values(), *base.extra}
    if dropped := [name for name in in_files if name not in spoken_of]:
        lines.append(f"left out, second copies or computed: {_named(dropped)}")
    return lines


def _named(names: Sequence[str]) -> str:
    """Returns the number of tensors and the first of their names."""
    shown = ", ".join(names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({shown}{more})"
