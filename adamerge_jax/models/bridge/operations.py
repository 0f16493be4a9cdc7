"""Operations of PyTorch whose versions in torchax are replaced: slow, wrong or hanging ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from adamerge_jax.models.layers import ACTIVATIONS, LINEAR_OUTPUT
from adamerge_jax.models.resizing import cubic, resizer, triangle


def linear(
    x: Float[Array, "... in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "... out"]:
    """Returns `x @ weight.T + bias`, under the name by which its result is kept.

    The product is over flat rows, whose gradient XLA's CPU backend computes faster.
    """
    y = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y = y + bias
    return checkpoint_name(y, LINEAR_OUTPUT).reshape(*x.shape[:-1], -1)


def gelu(x: Float[Array, "..."], *, approximate: str = "none") -> Float[Array, "..."]:
    """Returns GELU as the families here compute it, at half the time of torchax's.

    Args:
        x: Any values.
        approximate: `none`, or `tanh`.
    """
    return ACTIVATIONS["gelu_new" if approximate == "tanh" else "gelu"](x)


def embedding_bag(
    indices: Int[Array, "bags size"],
    table: Float[Array, "n width"],
    offsets: None = None,
    mode: str = "mean",
    per_sample_weights: Float[Array, "bags size"] | None = None,
    **options: Any,
) -> Float[Array, "bags width"]:
    """Returns the sum or the mean of each bag's rows of a table.

    Args:
        indices: The rows of each bag.
        table: The table.
        offsets: None: bags of sizes of their own are not known while a function is compiled.
        mode: `sum` or `mean`.
        per_sample_weights: Factors of the rows, of a sum.
        **options: Further options; none may be set.

    Raises:
        NotImplementedError: A padding index, a norm, bags by offsets, or another mode.
    """
    is_plain = mode in ("sum", "mean") and offsets is None and indices.ndim == 2
    if not is_plain or any(options.get(name) for name in ("max_norm", "include_last_offset")):
        raise NotImplementedError(f"embedding_bag of mode {mode!r} with offsets or a norm")
    if options.get("padding_idx") is not None:
        raise NotImplementedError("embedding_bag with a padding index")
    rows = table[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    return rows.sum(1) if mode == "sum" else rows.mean(1)


def solve_triangular(
    matrix: Float[Array, "... n n"],
    right: Float[Array, "... n m"],
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Float[Array, "... n m"]:
    """Returns `x` with `matrix @ x = right`, or `x @ matrix = right` if not `left`.

    With XLA's own solver the learning of a model with a delta rule (Lara) did not end on CPU, for a
    reason that was not found. This one is of products alone.

    Args:
        matrix: The matrix; what is on the other side of its diagonal is ignored.
        right: The right side.
        upper: True for an upper triangle.
        left: True where the matrix is on the left.
        unitriangular: True where the diagonal counts as ones.
    """
    if not left:
        solution = solve_triangular(
            matrix.mT, right.mT, upper=not upper, unitriangular=unitriangular
        )
        return solution.mT
    batch = jnp.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
    matrix = jnp.broadcast_to(matrix, (*batch, *matrix.shape[-2:]))
    right = jnp.broadcast_to(right, (*batch, *right.shape[-2:]))
    if upper:
        return _solve_lower(matrix[..., ::-1, ::-1], right[..., ::-1, :], unitriangular)[
            ..., ::-1, :
        ]
    return _solve_lower(matrix, right, unitriangular)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _solve_lower(
    matrix: Float[Array, "... n n"], right: Float[Array, "... n m"], unit: bool
) -> Float[Array, "... n m"]:
    """Returns the solution for a lower triangle, row by row."""

    def solve_row(row: int, solved: Array) -> Array:
        weights = jax.lax.dynamic_slice_in_dim(matrix, row, 1, -2)
        value = jax.lax.dynamic_slice_in_dim(right, row, 1, -2) - weights @ solved
        if not unit:
            value = value / jax.lax.dynamic_slice_in_dim(weights, row, 1, -1)
        return jax.lax.dynamic_update_slice_in_dim(solved, value, row, -2)

    return jax.lax.fori_loop(0, matrix.shape[-1], solve_row, jnp.zeros_like(right))


def _solve_lower_forward(matrix: Array, right: Array, unit: bool) -> tuple[Array, Any]:
    solution = _solve_lower(matrix, right, unit)
    return solution, (matrix, solution)


def _solve_lower_backward(unit: bool, residuals: Any, gradient: Array) -> tuple[Array, Array]:
    # These are the matrix and the solution, not the solutions of all rows.
    matrix, solution = residuals
    of_right = solve_triangular(matrix.mT, gradient, upper=True, unitriangular=unit)
    return -jnp.tril(of_right @ solution.mT, -1 if unit else 0), of_right


_solve_lower.defvjp(_solve_lower_forward, _solve_lower_backward)


def replace_operations(environment: Any) -> None:
    """Replaces operations in an environment of torchax."""
    from torchax.ops.ops_registry import Operator

    replacements = {
        torch.nn.functional.linear: linear,
        torch.ops.aten.linear: linear,
        torch.ops.aten.gelu: gelu,
        torch.nn.functional.embedding_bag: embedding_bag,
        torch.ops.aten._is_all_true: jnp.all,
        torch.linalg.solve_triangular: solve_triangular,
        torch.ops.aten.linalg_solve_triangular: solve_triangular,
        torch.ops.aten.upsample_bilinear2d: resizer(triangle, antialias=False),
        torch.ops.aten.upsample_bicubic2d: resizer(cubic, antialias=False),
        torch.ops.aten._upsample_bilinear2d_aa: resizer(triangle, antialias=True),
        torch.ops.aten._upsample_bicubic2d_aa: resizer(cubic, antialias=True),
    }
    for operation, replacement in replacements.items():
        environment._ops[operation] = Operator(
            operation,
            replacement,
            is_jax_function=True,
            is_user_defined=True,
            needs_env=False,
            is_view_op=False,
        )
