"""The granularity by entries, for masks."""

from math import prod

from jaxtyping import Array

from adamerge_jax.coefficients.granularity import Granularity, Shapes, Split, split_tensors
from adamerge_jax.parameter_names import is_stacked, tensor_shape


def entry(shapes: Shapes) -> Granularity:
    """One coefficient per expert and entry of every parameter, for the constraint `concrete`.

    Vectors and embedding tables have one for each entry too. A coefficients file of them is as
    large as all experts in float32, and learning takes several times that: for small models.

    Args:
        shapes: Shapes of the parameters.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, entry
        >>> shapes = {"dense.weight": (4, 3)}
        >>> entry(shapes).init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 12)
    """

    def split(name: str, shape: tuple[int, ...]) -> Split:
        def expand(values: Array) -> Array:
            return values[..., None]

        return Split(prod(shape), expand, "by entry")

    return split_tensors(
        shapes,
        split,
        prepare=lambda name, delta: delta.in_pieces(
            prod(tensor_shape(name, shapes[name])), stacked=is_stacked(name)
        ),
        vectors=True,
        tables=True,
    )._replace(cuts_rows=True)
