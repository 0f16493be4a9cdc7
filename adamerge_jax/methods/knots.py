"""KnOTS (Stoica et al., ICLR 2025): TIES in a basis that the experts share."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.interference import disjoint_mean, elect_sign, trim
from adamerge_jax.methods.by_matrix import require_coefficient
from adamerge_jax.methods.by_tensor import Tensor, by_tensor
from adamerge_jax.methods.core_space import EXACT, matrices_of
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.singular import decompose


def knots(coefficient: float = 0.6, density: float = 0.2) -> MergeMethod:
    """Returns the method that aligns matrices by one singular value decomposition, then TIES.

    With `[tau_1 ... tau_K] = U S [V_1^T ... V_K^T]`, side by side, the merged matrix is
    `U TIES(S V_1^T, ..., S V_K^T)`. In place of TIES a sum would be task arithmetic. Axes of a
    tensor after the first are one axis, and vectors are merged by TIES as they are.

    Model merging with SVD to tie the KnOTS, Stoica et al., ICLR 2025, section 4. Made for adapters,
    whose entries have no common meaning. TIES keeps the largest entries of each tensor here, of the
    whole model in the authors' code.

    Args:
        coefficient: The factor of the merged task vector; the paper chooses it on validation data,
            0.6 for ViT-B/32.
        density: The part of each expert's entries that stays, the largest ones, over 0 and up to 1;
            0.2 for ViT-B/32.

    Raises:
        ValueError: An argument is outside of its range.
    """
    require_coefficient(coefficient)
    steps = trim(density), elect_sign(), disjoint_mean()

    def merged_delta(tensor: Tensor) -> Float[Array, "..."]:
        if tensor.base.ndim < 2:
            return coefficient * ties(tensor.deltas)
        matrices = matrices_of(tensor)
        side_by_side = jnp.concatenate(list(matrices.values), axis=1)
        directions = decompose(side_by_side)
        basis = directions.leading(directions.rank()).left
        aligned = jnp.stack(
            [
                matrices.from_right(jnp.dot(basis.T, values, precision=EXACT))
                for values in matrices.values
            ]
        )
        merged = jnp.dot(matrices.from_left(basis), ties(aligned), precision=EXACT)
        return coefficient * merged.reshape(tensor.base.shape)

    def ties(values: Float[Array, "K ..."]) -> Float[Array, "..."]:
        changed = np.asarray(values)
        if not changed.size:
            return values.sum(0)
        for step in steps:
            changed = step.apply("", changed, step.fit({"": changed}))
        return jnp.asarray(changed.sum(0))

    return by_tensor(merged_delta)
