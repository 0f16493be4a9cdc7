"""Least-squares fits of linear layers to those of several experts, from Gram matrices."""

from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float

from adamerge_jax.methods.experts import mean, one_hot, tensor_sum
from adamerge_jax.methods.parts import in_parts
from adamerge_jax.statistics import Layer, Statistics
from adamerge_jax.task_vectors import Delta

Chunk = dict[str, list[int | None]]
"""Weights and their layers; `[None]` for a weight of no stack."""

DETERMINED = 1e-6
"""The part of the inputs' variance from which a direction counts as theirs, not as rounding."""

GRAM_BYTES = 2**30
"""The size up to which Gram matrices of several layers are held together."""


def require_fraction(option: str, value: float) -> None:
    """Raises a `ValueError` for an option that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{option} is {value}, expected from 0 to 1")


def linear_layers(
    statistics: Statistics, base: Mapping[str, Array], deltas: Mapping[str, Delta]
) -> list[Layer]:
    """Returns the layers of a model with the linear weights that experts changed, in order."""
    layers = []
    for layer in statistics.linear(base).layers:
        names = tuple(name for name in layer.names if name in deltas)
        norms = tuple(name for name in layer.norms if name in deltas)
        if names:
            layers.append(layer._replace(names=names, norms=norms))
    return layers


def scaled(gram: Float[Array, "n n"], off_diagonal: float) -> Float[Array, "n n"]:
    """Multiplies the entries of a matrix off its diagonal."""
    return off_diagonal * gram + (1 - off_diagonal) * jnp.diag(jnp.diag(gram))


class Fit:
    """The least-squares fit of one weight to those of K experts, as its change of their average.

    The average is subtracted first: `W = A + (sum_k (W_k - A) G_k) (sum_k G_k)^-1`, which loses
    less to rounding, and is nearest to the average where the sum is singular.
    """

    def __init__(self, delta: Delta, experts: int, number: int | None):
        """Begins with no expert.

        Args:
            delta: The task vectors of the weight.
            experts: The number of experts, K.
            number: The layer of a stacked weight.
        """
        self._delta, self._number = delta, number
        self._mean = mean(experts)
        self._gram: np.ndarray | None = None
        self._product: np.ndarray | None = None

    def add(self, expert: int, gram: Float[Array, "n n"]) -> None:
        """Adds an expert's Gram matrix, and its product with the expert's weight."""
        from_mean = one_hot(expert, len(self._mean)) - self._mean
        difference = tensor_sum(self._delta, from_mean, 2, self._number)
        product = jnp.dot(difference, gram, precision="highest")
        if self._gram is None:
            self._gram = np.zeros(gram.shape)
            self._product = np.zeros(product.shape)
        self._gram += np.asarray(gram)
        self._product += np.asarray(product)

    def solve(self) -> Float[np.ndarray, "m n"]:
        """Returns the fit less the average, solved in float64."""
        return solve_symmetric(self._gram, self._product).astype(np.float32)


def grams_of(
    statistics: Statistics,
    expert: int,
    parameters: Mapping[str, Array],
    chunk: Chunk,
) -> dict[tuple[str, int | None], Float[Array, "n n"]]:
    """Returns the Gram matrices of a chunk by weight and layer.

    Args:
        statistics: The calibration data.
        expert: The position of the expert, whose data is read.
        parameters: The model's parameters.
        chunk: The weights and layers.
    """
    places = {name: [number or 0 for number in numbers] for name, numbers in chunk.items()}
    grams = statistics.grams(expert, parameters, places)
    return {
        (name, number): gram
        for name, numbers in chunk.items()
        for number, gram in zip(numbers, grams[name], strict=True)
    }


def solve_symmetric(
    matrix: Float[np.ndarray, "n n"], product: Float[np.ndarray, "m n"]
) -> Float[np.ndarray, "m n"]:
    """Returns `x` with `x @ matrix = product`, for a matrix without negative values.

    Where there are several, `x` is the shortest one if every input is scaled to mean square 1.
    Columns of inputs that are always 0 are 0 in it.
    """
    solution = np.zeros_like(product)
    used = np.flatnonzero(np.diag(matrix))
    scale = 1 / np.sqrt(np.diag(matrix)[used])
    part = matrix[np.ix_(used, used)] * scale[:, None] * scale
    scaled_product = product[:, used] * scale
    try:
        factor = np.linalg.cholesky(part)
        determined = np.diag(factor).min(initial=1) ** 2 > DETERMINED
    except np.linalg.LinAlgError:
        determined = False
    if determined:
        scaled_solution = scipy.linalg.cho_solve((factor, True), scaled_product.T).T
    else:  # fewer inputs than features
        scaled_solution = scaled_product @ scipy.linalg.pinvh(part, rtol=DETERMINED)
    solution[:, used] = scaled_solution * scale
    return solution


def chunks(layers: Sequence[Layer], base: Mapping[str, Array]) -> Iterator[Chunk]:
    """Yields weights and layers whose Gram matrices are held together, in order.

    Args:
        layers: The layers of a model.
        base: The parameters of the base by name.
    """

    def bytes_of(layer: Layer) -> int:
        return sum(4 * base[name].shape[-1] ** 2 for name in layer.names)

    for part in in_parts(layers, bytes_of, GRAM_BYTES):
        chunk: Chunk = {}
        for layer in part:
            for name in layer.names:
                chunk.setdefault(name, []).append(layer.number)
        yield chunk
