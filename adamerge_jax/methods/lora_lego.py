"""LoRA-LEGO (Zhao et al., ICLR 2025): clusters of the adapters' units of rank one."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.methods.by_tensor import Tensor, by_tensor
from adamerge_jax.methods.core_space import EXACT
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.task_vectors import LowRankDelta

STARTS = 5
"""Starts of the clustering, of which the best one counts."""

ITERATIONS = 50
"""Iterations of each start."""


def lora_lego(rank: int | None = None, seed: int = 0) -> MergeMethod:
    """Returns the method that replaces clusters of the adapters' units by their means.

    A unit is a column b of B (with the adapter's scaling) and the row a of A that it is multiplied
    with; all adapters' units together are put into `rank` clusters by k-means of the directions of
    a and b. The merged adapter has one unit for each cluster, the mean of its units. This is
    shorter than they are: it is multiplied by the mean of their largest magnitudes over its own
    (parameter reweighting). The product of the merged B and A is multiplied by
    `sqrt(r / rank)`, where r is the adapters' rank (output reweighting). Vectors get the mean of
    the task vectors.

    Merging LoRAs like Playing LEGO, Zhao et al., ICLR 2025. No code of its authors was found: the
    directions that are clustered and the two reweightings follow a re-implementation by others. The
    start of the clustering is ours (drawn far apart, the best of five).

    Args:
        rank: The rank of the merged adapter; by default that of the adapters, the largest one. It
            is at most the number of units.
        seed: Seed of the clustering.

    Raises:
        ValueError: An argument is outside of its range.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected a whole number, at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected a whole number, at least 0")

    def merged_delta(tensor: Tensor) -> Float[Array, "..."]:
        if tensor.base.ndim == 1:
            return tensor.deltas.mean(0)
        if tensor.factors is None:
            raise InputError(
                f"lora_lego: an expert changed {tensor.name} without low-rank factors, expected "
                "LoRA adapters alone; merge whole models by another method, such as knots or "
                "tsv_m, or leave the tensor out with keep_from_base"
            )
        units = _units(tensor.factors)
        if not len(units.left):
            return jnp.zeros(tensor.base.shape)
        clusters = _clusters(units, min(rank or units.rank, len(units.left)), seed)
        merged = [_mean(units, members) for members in clusters]
        left, right = (np.stack(halves) for halves in zip(*merged, strict=True))
        product = jnp.dot(jnp.asarray(left.T), jnp.asarray(right), precision=EXACT)
        return float(np.sqrt(units.rank / len(merged))) * product

    return by_tensor(merged_delta)


class _Units(NamedTuple):
    """The units of all adapters.

    Attributes:
        left: `[N, m]`, columns of B.
        right: `[N, n]`, rows of A.
        rank: The largest number of units of one adapter.
    """

    left: Float[np.ndarray, "N m"]
    right: Float[np.ndarray, "N n"]
    rank: int


def _units(factors: LowRankDelta) -> _Units:
    """Returns the units that are not 0; those that pad an adapter of lower rank are."""
    left, right = np.asarray(factors.left).swapaxes(1, 2), np.asarray(factors.right)
    changing = left.any(-1) & right.any(-1)
    return _Units(left[changing], right[changing], int(changing.sum(1).max()))


def _clusters(units: _Units, count: int, seed: int) -> list[Int[np.ndarray, " members"]]:
    """Returns the members of at most `count` clusters of units whose directions are alike."""
    from scipy.cluster.vq import kmeans2

    if count == len(units.left):
        return [np.array([unit]) for unit in range(count)]
    halves = (half / np.linalg.norm(half, axis=1, keepdims=True) for half in units[:2])
    directions = np.concatenate(list(halves), axis=1)
    best, least = np.zeros(len(directions), int), np.inf
    for start in range(STARTS):
        centres = _spread_out(directions, count, np.random.default_rng([seed, start]))
        centres, labels = kmeans2(directions, centres, iter=ITERATIONS, minit="matrix")
        distance = np.square(directions - centres[labels]).sum()
        if distance < least:
            best, least = labels, distance
    return [np.flatnonzero(best == label) for label in np.unique(best)]


def _spread_out(
    points: Float[np.ndarray, "N d"], count: int, generator: np.random.Generator
) -> Float[np.ndarray, "count d"]:
    """Returns at most `count` different points, drawn far from each other (k-means++)."""
    chosen = [points[generator.integers(len(points))]]
    distances = np.full(len(points), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, np.square(points - chosen[-1]).sum(1, dtype=np.float64))
        if not distances.any():
            break
        chosen.append(points[generator.choice(len(points), p=distances / distances.sum())])
    return np.stack(chosen)


def _mean(
    units: _Units, members: Int[np.ndarray, " members"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " n"]]:
    """Returns the mean of some units, as large as they are in the mean."""
    both = np.concatenate([units.left[members], units.right[members]], axis=1)
    mean = both.mean(0)
    largest = np.abs(mean).max()
    if largest > 0:
        mean *= np.abs(both).max(1).mean() / largest
    return mean[: units.left.shape[1]], mean[units.left.shape[1] :]
