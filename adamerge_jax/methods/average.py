"""The plain average of the experts (Wortsman et al., ICML 2022)."""

from collections.abc import Mapping

from jaxtyping import Array

from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic
from adamerge_jax.mixing import Mixture
from adamerge_jax.task_vectors import Delta


def average() -> MergeMethod:
    """Returns the method that averages the experts: `(1 / K) sum_k theta_k`."""

    def merge(
        base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
    ) -> Mapping[str, Array | Mixture]:
        return task_arithmetic(1 / experts).merge(base, deltas, experts)

    return MergeMethod(merge)
