r"""Coefficients of tensors, layers or experts in place of finer ones, by least squares.

What the fine coefficients add to the base is, for tensor t, `delta_t = sum_k s_tk * tau_tk`. The
coarse ones minimise the squared distance to it, over all tensors T that share them:

    c = argmin_c  sum_{t in T} || sum_k c_k tau_tk - delta_t ||^2     that is    G c = b
    G_jk = sum_t <tau_tj, tau_tk>        b_k = sum_t <tau_tk, delta_t>

so that a row counts as much as the experts changed it. Only the Gram matrix of K experts is kept of
a tensor.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import make_granularity
from adamerge_jax.mixing import Mixture, materialize_compiled
from adamerge_jax.pipeline.initial_merge import read_tensor_delta
from adamerge_jax.pipeline.models import Models

Coarse = Literal["tensor", "layer", "task"]

_ENTRIES_AT_ONCE = 2**20
"""Entries that are float64 at a time."""

_RANK_TOLERANCE = 1e-11
"""Directions of the experts' changes below this part of the largest are none: rounding of float32
weights is smaller than its root."""


class Loss(NamedTuple):
    """The part of a merge that coarse coefficients lose.

    Attributes:
        name: The tensor.
        lost: The norm of the difference between the two merged tensors.
        change: The norm of what the fine coefficients add to the base.
    """

    name: str
    lost: float
    change: float

    @property
    def relative(self) -> float:
        """The lost part of the change, from 0 to 1."""
        return self.lost / self.change if self.change else 0.0


class Coarsened(NamedTuple):
    """Coarse coefficients, and their losses by tensor in the order of the base."""

    coefficients: Coefficients
    losses: list[Loss]

    @property
    def relative(self) -> float:
        """The lost part of the change over all tensors, from 0 to 1."""
        lost, change = (
            np.linalg.norm([getattr(loss, field) for loss in self.losses])
            for field in ("lost", "change")
        )
        return float(lost / change) if change else 0.0


class _Moments(NamedTuple):
    """Inner products of one tensor: of the experts' changes, with the merge's, of the merge's."""

    gram: Float[np.ndarray, "K K"]
    with_merge: Float[np.ndarray, " K"]
    of_merge: float


def coarsen(models: Models, coefficients: Coefficients, to: Coarse) -> Coarsened:
    """Finds the coarse coefficients whose merge is nearest to that of finer ones.

    Reads the checkpoints, a tensor of every expert at a time.

    Args:
        models: The base and the experts of the coefficients, in their order.
        coefficients: The coefficients.
        to: The granularity of the result.

    Returns:
        The coefficients, without a constraint and otherwise with the facts of the given ones, and
        what they lose. Where experts changed a tensor alike, the smallest solution is taken.
    """
    granularity = make_granularity(to, {}, coefficients.shapes)
    start = {name: jnp.zeros((1, len(coefficients.experts))) for name in coefficients.shapes}
    groups = granularity.init(start)
    # A scale is that of its group, which its number tells.
    numbered = {group: jnp.full_like(values, n) for n, (group, values) in enumerate(groups.items())}
    names = list(groups)
    group_of = {
        name: names[int(np.asarray(scale).flat[0])]
        for name, scale in granularity.scales(numbered).items()
    }
    moments = dict(_moments(models, coefficients))
    solved: dict[str, Float[np.ndarray, " K"]] = {}
    for group in names:
        members = [moments[name] for name in moments if group_of[name] == group]
        gram = sum((m.gram for m in members), np.zeros((len(coefficients.experts),) * 2))
        with_merge = sum((m.with_merge for m in members), np.zeros(len(coefficients.experts)))
        inverse = np.linalg.pinv(gram, rcond=_RANK_TOLERANCE, hermitian=True)
        solved[group] = (inverse @ with_merge).astype(np.float32)
    coarse = dataclasses.replace(
        coefficients,
        values={group: values.reshape(groups[group].shape[1:]) for group, values in solved.items()},
        granularity=to,
        granularity_options={},
        constraint="free",
        objective=f"{coefficients.objective} (by {coefficients.granularity}, then least squares)",
    )
    losses = [_loss(name, m, solved[group_of[name]]) for name, m in moments.items()]
    return Coarsened(coarse, losses)


def _moments(models: Models, coefficients: Coefficients) -> Iterator[tuple[str, _Moments]]:
    """Yields the inner products of every merged tensor."""
    granularity, scales = coefficients.unstacked_granularity, coefficients.scales()
    experts = len(coefficients.experts)
    for name in models.base.names:
        if name not in scales or name in models.kept_from_base:
            continue
        delta = read_tensor_delta(models, name, coefficients.interference)
        if delta is None:  # only experts that are left out changed it
            yield name, _Moments(np.zeros((experts, experts)), np.zeros(experts), 0.0)
            continue
        shape = coefficients.shapes[name]
        nothing = np.zeros(shape, np.float32)
        fine = Mixture(nothing, granularity.prepare(name, delta), scales[name])
        merge = np.asarray(materialize_compiled(fine)).reshape(-1)
        one_hot = np.eye(experts, dtype=np.float32).reshape(experts, experts, *(1 for _ in shape))
        changes = [
            np.asarray(materialize_compiled(Mixture(nothing, delta, jnp.asarray(chosen)))).reshape(
                -1
            )
            for chosen in one_hot
        ]
        yield name, _inner_products(changes, merge)


def _inner_products(
    changes: list[Float[np.ndarray, " N"]], merge: Float[np.ndarray, " N"]
) -> _Moments:
    """Returns the inner products in float64, a part of the entries at a time."""
    total = np.zeros((len(changes) + 1,) * 2)
    for first in range(0, len(merge), _ENTRIES_AT_ONCE):
        part = slice(first, first + _ENTRIES_AT_ONCE)
        rows = np.stack([array[part] for array in (*changes, merge)]).astype(np.float64)
        total += rows @ rows.T
    return _Moments(total[:-1, :-1], total[:-1, -1], float(total[-1, -1]))


def _loss(name: str, moments: _Moments, coarse: Float[np.ndarray, " K"]) -> Loss:
    c = coarse.astype(np.float64)
    square = moments.of_merge - 2 * c @ moments.with_merge + c @ moments.gram @ c
    # Of equal merges rounding is left, of either sign.
    negligible = moments.of_merge * np.finfo(np.float32).eps ** 2
    lost = float(np.sqrt(square)) if square > negligible else 0.0
    return Loss(name, lost, float(np.sqrt(moments.of_merge)))
