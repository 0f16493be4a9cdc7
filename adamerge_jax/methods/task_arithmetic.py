"""Task arithmetic (Ilharco et al., ICLR 2023): one coefficient for all experts and parameters."""

from collections.abc import Mapping

from jaxtyping import Array

from adamerge_jax.methods.experts import weighted
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.mixing import Mixture
from adamerge_jax.task_vectors import Delta


def task_arithmetic(coefficient: float = 0.3) -> MergeMethod:
    """Returns the method `theta_base + coefficient * sum_k tau_k`.

    Args:
        coefficient: The coefficient (lambda) of all experts and parameters.

    Raises:
        ValueError: The coefficient is beyond 1e6.
    """
    if not abs(coefficient) <= 1e6:
        raise ValueError(f"coefficient is {coefficient}, expected from -1e6 to 1e6")

    def merge(
        base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
    ) -> dict[str, Array | Mixture]:
        changed = {name: base[name] for name in deltas}
        return weighted(changed, deltas, [coefficient] * experts)

    return MergeMethod(merge)
