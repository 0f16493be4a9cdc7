"""ACE-Merging (Xu et al., CVPR 2026): covariances of inputs, estimated from the task vectors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.methods.by_matrix import by_matrix
from adamerge_jax.methods.core_space import EXACT, Matrices
from adamerge_jax.methods.iso_c import isotropic
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.singular import decompose


def ace(
    coefficient: float = 1.0,
    regularization: float = 0.01,
    heterogeneity: float = 0.3,
    refined: float = 0.3,
) -> MergeMethod:
    """Returns the method that weights experts by covariances of inputs that task vectors tell.

    `W_k` is the task vector `[m, n]` without the mean of its rows, and `C_k = W_k^T W_k` stands for
    the covariance of the layer's inputs. Where the spread of sizes
    `var(log ||tau_k||^2) / mean(log ||tau_k||^2)^2` is over `heterogeneity`, `C_k` and
    `regularization` are divided by the trace of `C_k`. With `R_k = C_k + regularization I` and `c`,
    the mean of the rows of `sum_k C_k` (divided by the mean of `||tau_k||^2` where the spread is
    large), the merged matrix is

        W = (sum_k W_k R_k) (sum_k R_k + 1 c^T)^-1

    Where the spread is large, the leading singular directions of
    `W + sum_k tau_k (C_k - mean_j R_j)` are added, all with the mean of their singular values.
    Tensors that are no matrices get the mean of the task vectors.

    The merged matrix is about as long as the sum of the task vectors, not as their mean. Where task
    vectors are long, as those of LoRA adapters are, it goes too far at a coefficient of 1: six
    merged adapters of a sentence encoder had 54.9% of the answers right at 1, 66.1% at 0.6 and
    69.8% at 0.4 (their plain sum: 59.7% at 1, 68.3% at 0.6). Choose it with validation data there.

    ACE-Merging, Xu et al., CVPR 2026, section 4, equations 5 to 19; the arguments' defaults and the
    variance's divisor K - 1 are those of the authors' code. Experts that do not change a matrix are
    left out there: their logarithm is infinite.

    Args:
        coefficient: The factor of the merged task vectors; the paper's is 1, for full fine-tunes.
        regularization: The paper's epsilon, over 0.
        heterogeneity: The spread of sizes from which experts are scaled and `W` is refined, the
            paper's tau, at least 0.
        refined: The part of singular directions that are added, from 0 to 1.

    Raises:
        ValueError: An argument is outside of its range.
    """
    if not 0 < regularization <= 1e6:
        raise ValueError(f"regularization is {regularization}, expected over 0 and up to 1e6")
    if not heterogeneity >= 0:
        raise ValueError(f"heterogeneity is {heterogeneity}, expected at least 0")
    if not 0 <= refined <= 1:
        raise ValueError(f"refined is {refined}, expected from 0 to 1")

    def merged(matrices: Matrices) -> Float[Array, "m n"]:
        squares = jnp.square(matrices.values).sum((1, 2))
        changing = np.flatnonzero(squares)
        if not changing.size:
            return jnp.zeros(matrices.shape)
        spread = _spread(np.asarray(squares, np.float64)[changing])
        # Rows have a mean entry by entry only.
        values = jnp.stack([matrices.from_left(values) for values in matrices.values[changing]])
        ones = jnp.ones((1, matrices.shape[1]))
        if matrices.right is not None:
            ones = jnp.dot(ones, matrices.right, precision=EXACT)
        scaled = spread > heterogeneity
        weighted, fused = _weighted(values, ones, matrices.shape[1], regularization, scaled)
        if scaled:
            directions = decompose(fused)
            leading = directions.leading(int(refined * directions.rank()))
            weighted = weighted + isotropic(leading)
        return matrices.from_right(weighted)

    return by_matrix(merged, coefficient)


def _spread(squares: Float[np.ndarray, " K"]) -> float:
    """Returns the paper's heterogeneity of the experts' squared norms (equation 7)."""
    logarithms = np.log(squares)
    if len(squares) == 1:
        return 0.0
    return float(logarithms.var(ddof=1) / max(np.square(logarithms.mean()), 1e-12))


@functools.partial(jax.jit, static_argnames="scaled")
def _weighted(
    values: Float[Array, "K m q"],
    ones: Float[Array, "1 q"],
    width: int,
    regularization: float,
    scaled: bool,
) -> tuple[Float[Array, "m q"], Float[Array, "m q"]]:
    """Returns `W`, and the matrix whose leading directions refine it.

    Args:
        values: The task vectors, their rows in a basis of q orthonormal vectors.
        ones: A row of n ones in that basis, as far as it is in it.
        width: n.
        regularization: See `ace`.
        scaled: True where experts are scaled by the traces of their covariances.
    """
    product = functools.partial(jnp.einsum, precision=EXACT)

    def add(totals: _Totals, matrix: Float[Array, "m q"]) -> tuple[_Totals, None]:
        centred = matrix - matrix.mean(0)
        covariance = product("mq,mr->qr", centred, centred)
        trace = jnp.trace(covariance)
        divisor = jnp.where(scaled & (trace > 0), trace, 1)
        covariance, ridge = covariance / divisor, regularization / divisor
        return _Totals(
            totals.covariance + covariance,
            totals.ridge + ridge,
            totals.outputs + product("mq,qr->mr", centred, covariance) + ridge * centred,
            totals.structured + product("mq,qr->mr", matrix, covariance),
        ), None

    _, height, basis = values.shape
    matrices = jnp.zeros((basis, basis)), jnp.zeros((height, basis))
    start = _Totals(matrices[0], jnp.zeros(()), matrices[1], matrices[1])
    totals, _ = jax.lax.scan(add, start, values)
    prior = product("zq,qr->zr", ones, totals.covariance) / width
    if scaled:
        prior = prior / (jnp.square(values).sum() / len(values))
    regularized = totals.covariance + totals.ridge * jnp.eye(basis)
    weighted = jnp.linalg.solve((regularized + ones.T * prior).T, totals.outputs.T).T
    common = product("mq,qr->mr", values.sum(0), regularized) / len(values)
    return weighted, weighted + totals.structured - common


class _Totals(NamedTuple):
    """Sums over experts.

    Attributes:
        covariance: `sum_k C_k`.
        ridge: The factor of the identity in `sum_k R_k`.
        outputs: `sum_k W_k R_k`.
        structured: `sum_k tau_k C_k`.
    """

    covariance: Float[Array, "q q"]
    ridge: Float[Array, ""]
    outputs: Float[Array, "m q"]
    structured: Float[Array, "m q"]
