"""Moments of the features that two models compute from the same data, in one layer."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.mixing import Mixture
from adamerge_jax.statistics.grams import CalibrationBatch
from adamerge_jax.statistics.linear import Layer, Run, row_weights
from adamerge_jax.statistics.tap import tap


class Moments(NamedTuple):
    """Moments of the inputs X of a linear layer in one model, and Y in another, float32.

    Attributes:
        mean: The mean row of X, `[n]`.
        other_mean: The mean row of Y, `[n]`.
        gram: `X^T X / N`, `[n, n]`.
        cross: `X^T Y / N`, `[n, n]`.
    """

    mean: Float[Array, " n"]
    other_mean: Float[Array, " n"]
    gram: Float[Array, "n n"]
    cross: Float[Array, "n n"]


class NormMoments(NamedTuple):
    """Moments of the normalised inputs Z of a normalisation in the first model, float32.

    Attributes:
        mean: The mean row, `[n]`.
        energy: The mean of squares, `[n]`.
    """

    mean: Float[Array, " n"]
    energy: Float[Array, " n"]


def feature_moments(
    run: Run, masks: Mapping[str, str | None]
) -> Callable[..., dict[str, Moments | NormMoments]]:
    """Returns the function that computes moments of two models' features in one layer.

    The function is `(parameters, other, batches, layer)` to the moments by the names of the layer's
    weights. Two forward passes are run per batch. On the device are the sums for one layer, and the
    other model's features in it for one batch.

    Args:
        run: The model.
        masks: The input that masks the rows of each weight's inputs; see `linear.Linear`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(
        sums: dict[str, Moments | NormMoments],
        counts: dict[str, Float[Array, ""]],
        number: Int[Array, ""],
        parameters: Mapping[str, Array | Mixture],
        other: Mapping[str, Array | Mixture],
        inputs: Mapping[str, Array],
        weights: Float[Array, " B"],
    ) -> tuple[dict[str, Moments | NormMoments], dict[str, Array]]:
        refs = jax.tree.map(jax.new_ref, sums)
        count_refs = jax.tree.map(jax.new_ref, counts)
        linear = [name for name in sums if isinstance(sums[name], Moments)]
        shapes: dict[str, tuple[int, ...]] = {}

        def note_shape(name: str, layer: Int[Array, ""] | None, x: Float[Array, "N n"]) -> None:
            shapes[name] = x.shape

        jax.eval_shape(lambda: run(tap(other, linear, note_shape), inputs))
        features = {name: jax.new_ref(jnp.zeros(shape)) for name, shape in shapes.items()}

        def here(layer: Int[Array, ""] | None) -> bool | Array:
            return True if layer is None else layer == number

        def keep(name: str, layer: Int[Array, ""] | None, x: Float[Array, "N n"]) -> None:
            def write() -> None:
                features[name][...] = x.astype(jnp.float32)

            jax.lax.cond(here(layer), write, lambda: None)

        def observe(name: str, layer: Int[Array, ""] | None, x: Float[Array, "N n"]) -> None:
            def add_rows() -> None:
                of_row = row_weights(masks[name], inputs, weights, len(x))
                wide, sum_refs = x.astype(jnp.float32), refs[name]
                weighted = wide * of_row[:, None]
                sum_refs.mean[...] += weighted.sum(0)
                count_refs[name][...] += of_row.sum()
                if isinstance(sum_refs, NormMoments):
                    sum_refs.energy[...] += (weighted * wide).sum(0)
                    return
                of_other = features[name][...]
                dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
                sum_refs.other_mean[...] += (of_other * of_row[:, None]).sum(0)
                sum_refs.gram[...] += dot(weighted.T, wide)
                sum_refs.cross[...] += dot(weighted.T, of_other)

            jax.lax.cond(here(layer), add_rows, lambda: None)

        run(tap(other, linear, keep), inputs)
        run(tap(parameters, sums, observe), inputs)
        freeze = functools.partial(jax.tree.map, jax.freeze)
        return freeze(refs), freeze(count_refs)

    def compute(
        parameters: Mapping[str, Array | Mixture],
        other: Mapping[str, Array | Mixture],
        batches: Iterable[CalibrationBatch],
        layer: Layer,
    ) -> dict[str, Moments | NormMoments]:
        sums: dict[str, Moments | NormMoments] = {}
        for name in (*layer.names, *layer.norms):
            size = jax.tree.leaves(parameters[name])[0].shape[-1]
            vector = functools.partial(jnp.zeros, size)
            if name in layer.norms:
                sums[name] = NormMoments(vector(), vector())
            else:
                matrix = functools.partial(jnp.zeros, (size, size))
                sums[name] = Moments(vector(), vector(), matrix(), matrix())
        counts = {name: jnp.zeros(()) for name in sums}
        number = jnp.int32(layer.number or 0)
        for batch in batches:
            sums, counts = add(sums, counts, number, parameters, other, batch.inputs, batch.weights)
        return {
            name: jax.tree.map(lambda total, count=counts[name]: total / count, moments)
            for name, moments in sums.items()
        }

    return compute
