"""The account of a merge: what becomes of every tensor of the base."""

from collections.abc import Iterable, Sequence

import numpy as np

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
    heads = {name for task in models.experts for name in models.head_names(task)}
    carried = [name for name in base.extra if name not in heads]
    if carried:
        lines.append(f"as in the base, no parameters that experts share: {_named(carried)}")
    if replaced := [name for name in base.extra if name in heads]:
        lines.append(f"not in the merge, each task has its own: {_named(replaced)}")
    spoken_of = {*base.names.values(), *base.extra}
    if dropped := [name for name in in_files if name not in spoken_of]:
        lines.append(f"left out, second copies or computed: {_named(dropped)}")
    for model in (base, *models.experts.values()):
        lines += [f"{model.role}: {note}" for note in model.checkpoint.notes]
    return lines


def _named(names: Sequence[str]) -> str:
    """Returns the number of tensors and the first of their names."""
    shown = ", ".join(names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({shown}{more})"
