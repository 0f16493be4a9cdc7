"""A granularity as a user would write it: it knows nothing of the package's, nor of their facts."""

import jax.numpy as jnp

from adamerge_jax import extension
from adamerge_jax.coefficients.granularities import Granularity
from adamerge_jax.parameter_names import is_stacked


@extension
def rows(shapes) -> Granularity:
    """One coefficient per row of a matrix, one per vector: as the package's `row` without tables.

    A recipe names it `tests.own_granularity:rows`.
    """

    def has_rows(name):
        return len(shapes[name]) - is_stacked(name) > 1

    def init(start):
        return {
            name: jnp.repeat(start[name][..., None], shapes[name][is_stacked(name)], axis=-1)
            if has_rows(name)
            else start[name]
            for name in sorted(shapes)
        }

    def scales(values):
        return {n: (v if is_stacked(n) else v[0])[..., None] for n, v in values.items()}

    return Granularity(init, scales)
