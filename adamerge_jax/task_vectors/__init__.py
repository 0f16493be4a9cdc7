"""Task vectors: the changes of each expert to the base model, `tau_k = theta_k - theta_base`.

A task vector is frozen. One leaf holds the deltas of all K experts for one parameter, in a
representation of its own: entry by entry, as 8-bit integers, as low-rank factors that are never
multiplied out, or some experts one way and some the other. A granularity may lay it out anew. It
lies on the device or outside of it.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked, named_leaves
from adamerge_jax.task_vectors.delta import Delta, LoadedDelta
from adamerge_jax.task_vectors.dense import ChunkedDelta, DenseDelta
from adamerge_jax.task_vectors.factored import FactoredDelta
from adamerge_jax.task_vectors.joined import JoinedDelta
from adamerge_jax.task_vectors.low_rank import LowRankDelta, LowRankPieces
from adamerge_jax.task_vectors.offload.streamed import StreamedDelta
from adamerge_jax.task_vectors.quantized import QuantizedDelta
from adamerge_jax.task_vectors.row_column import RowColumnDelta

__all__ = [
    "ChunkedDelta",
    "Delta",
    "DenseDelta",
    "FactoredDelta",
    "JoinedDelta",
    "LoadedDelta",
    "LowRankDelta",
    "LowRankPieces",
    "QuantizedDelta",
    "RowColumnDelta",
    "StreamedDelta",
    "task_vectors",
]


def task_vectors(
    base: PyTree[Array], experts: Sequence[PyTree[Array]] | Mapping[str, PyTree[Array]]
) -> dict[str, DenseDelta]:
    """Subtracts the base model from its experts.

    Args:
        base: Parameters of the base model, any pytree.
        experts: K pytrees of the same structure and shapes; by name, messages have these.

    Returns:
        One delta per parameter name, `[K, *shape]`, or `[L, K, *shape]` where the name is stacked.
        Parameters that no expert changed have no entry: nothing is to be mixed there. Nor have
        leaves that are no floating-point numbers, such as counters and random keys, which stay the
        base's.

    Raises:
        InputError: An expert's structure or a shape differs from the base's.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, section 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import task_vectors
        >>> base = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> expert = {"dense": {"kernel": jnp.full((2, 3), 1.5), "bias": jnp.zeros(3)}}
        >>> deltas = task_vectors(base, [expert, base])
        >>> list(deltas)
        ['dense.kernel']
        >>> deltas["dense.kernel"].values.shape
        (2, 2, 3)
    """
    deltas = {}
    base_leaves = named_leaves(base)
    by_name = dict(enumerate(experts)) if isinstance(experts, Sequence) else experts
    expert_leaves = [named_leaves(expert) for expert in by_name.values()]
    for expert, leaves in zip(by_name, expert_leaves, strict=True):
        if difference := sorted(base_leaves.keys() ^ leaves.keys()):
            where = "base" if difference[0] in base_leaves else f"expert {expert!r}"
            raise InputError(
                f"expert {expert!r}: parameter {difference[0]!r} is only in the {where}; "
                "experts must have the base's parameters"
            )
    for name, base_leaf in base_leaves.items():
        for expert, leaves in zip(by_name, expert_leaves, strict=True):
            if leaves[name].shape != base_leaf.shape:
                raise InputError(
                    f"expert {expert!r}: parameter {name!r} has shape {leaves[name].shape}, "
                    f"the base has {base_leaf.shape}"
                )
        if not jnp.issubdtype(base_leaf.dtype, jnp.floating):
            continue
        start = jnp.asarray(base_leaf, jnp.float32)
        differences = [jnp.asarray(leaves[name], jnp.float32) - start for leaves in expert_leaves]
        values = jnp.stack(differences, axis=1 if is_stacked(name) else 0)
        if values.any():
            deltas[name] = DenseDelta(values.astype(base_leaf.dtype))
    return deltas
