"""Gram matrices of the inputs of linear layers: `G = X^T X / N` over N rows that are no padding."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from adamerge_jax.mixing import Mixture
from adamerge_jax.statistics.linear import Run, row_weights
from adamerge_jax.statistics.tap import tap

Places = Mapping[str, Sequence[int]]
"""The layers asked for by the name of a weight; `[0]` for a weight of no stack."""


class CalibrationBatch(NamedTuple):
    """A batch of calibration examples.

    Attributes:
        inputs: Model inputs by name, `[B, ...]`.
        weights: `[B]`, 1 for examples that count and 0 for those that fill up the batch.
        labels: The labels, `[B]` or `[B, T]`, or None.
        counted: `[B, T]`, True for the tokens that words are classified by; None for others.
    """

    inputs: Mapping[str, Shaped[Array, "B ..."]]
    weights: Float[np.ndarray, " B"]
    labels: Int[np.ndarray, "B ..."] | None = None
    counted: Bool[np.ndarray, "B T"] | None = None


def gram_matrices(
    run: Run, masks: Mapping[str, str | None]
) -> Callable[..., dict[str, Float[Array, "C n n"]]]:
    """Returns the function that computes Gram matrices of a model's linear layers.

    The function is `(parameters, batches, places) -> {name: [C, n, n]}`, with a matrix for each of
    the C layers asked for. Sums are float32, whatever the dtype of activations. One forward pass is
    run per batch; on the device are the sums asked for, and the activations of a batch.

    Args:
        run: The model.
        masks: The input that masks the rows of each weight's inputs; see `linear.Linear`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(
        sums: dict[str, Float[Array, "C n n"]],
        counts: dict[str, Float[Array, " C"]],
        slots: Mapping[str, Int[Array, " L"]],
        parameters: Mapping[str, Array | Mixture],
        inputs: Mapping[str, Array],
        weights: Float[Array, " B"],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        sum_refs = {name: jax.new_ref(total) for name, total in sums.items()}
        count_refs = {name: jax.new_ref(count) for name, count in counts.items()}

        def observe(name: str, layer: Int[Array, ""] | None, x: Float[Array, "N n"]) -> None:
            slot = slots[name][0 if layer is None else layer]

            def add_rows() -> None:
                of_row = row_weights(masks[name], inputs, weights, len(x))
                wide = x.astype(jnp.float32)
                sum_refs[name][slot] += jnp.dot(
                    (wide * of_row[:, None]).T, wide, precision=jax.lax.Precision.HIGHEST
                )
                count_refs[name][slot] += of_row.sum()

            jax.lax.cond(slot >= 0, add_rows, lambda: None)

        run(tap(parameters, sums, observe), inputs)
        freeze = functools.partial(jax.tree.map, jax.freeze)
        return freeze(sum_refs), freeze(count_refs)

    def compute(
        parameters: Mapping[str, Array | Mixture],
        batches: Iterable[CalibrationBatch],
        places: Places,
    ) -> dict[str, Float[Array, "C n n"]]:
        sums, counts, slots = {}, {}, {}
        for name, layers in places.items():
            weight = parameters[name]
            base = weight.base if isinstance(weight, Mixture) else weight
            sums[name] = jnp.zeros((len(layers), base.shape[-1], base.shape[-1]))
            counts[name] = jnp.zeros(len(layers))
            slots[name] = np.full(len(base) if base.ndim == 3 else 1, -1, np.int32)
            slots[name][list(layers)] = np.arange(len(layers))
        for batch in batches:
            sums, counts = add(sums, counts, slots, parameters, batch.inputs, batch.weights)
        return {name: sums[name] / counts[name][:, None, None] for name in places}

    return compute
