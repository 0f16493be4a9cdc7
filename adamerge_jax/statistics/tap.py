"""A tap: a lazy leaf in place of a weight that shows the inputs which a layer multiplies with it.

As `Mixture`s do, taps go through any model, and through a scan over stacked layers, without a
change to the model.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.mixing import Lazy, Mixture, is_lazy
from adamerge_jax.parameter_names import is_stacked

Observe = Callable[[str, Int[Array, ""] | None, Float[Array, "N n"] | None], None]
"""The function `(name, layer, x)` that is called, while a model is traced, where a layer computes
`x @ weight.T`, or a normalisation `x * weight`. The layer is its number in the stack, or None; x is
None where rows of the weight are looked up. It may write to a `jax.Ref`, also within a scan."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap(Lazy):
    """A weight whose use is observed.

    Attributes:
        weight: The weight, `[m, n]` of a linear layer or `[n]` of a normalisation, or a `Mixture`;
            with a leading axis of length L where stacked.
        layer: The number of the layer, `[L]` where stacked; None for a parameter of no stack.
        name: The name of the parameter.
        observe: The function that is called with the inputs.
    """

    weight: Float[Array, "..."] | Mixture
    layer: Int[Array, "..."] | None
    name: str = dataclasses.field(metadata={"static": True})
    observe: Observe = dataclasses.field(metadata={"static": True})

    def materialize(self) -> Float[Array, "..."]:
        """Returns the weight."""
        return self.weight.materialize() if is_lazy(self.weight) else self.weight

    def apply(self, x: Float[Array, "N n"]) -> Float[Array, "N m"]:
        """Returns `x @ weight.T`."""
        self.observe(self.name, self.layer, x)
        return self.weight.apply(x) if is_lazy(self.weight) else x @ self.weight.T

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns `weight[index]`."""
        self.observe(self.name, self.layer, None)
        return self.weight.rows(index) if is_lazy(self.weight) else self.weight[index]

    def times(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """Returns `x * weight`."""
        self.observe(self.name, self.layer, x.reshape(-1, x.shape[-1]))
        return x * self.materialize()


def tap(
    parameters: Mapping[str, Array | Mixture], names: Collection[str], observe: Observe
) -> dict[str, Array | Lazy]:
    """Puts taps in place of some parameters.

    Args:
        parameters: Parameters by name, arrays or `Mixture`s.
        names: The parameters whose use is observed.
        observe: The function that is called with their inputs.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.statistics.tap import tap
        >>> def observe(name, layer, x):
        ...     print(name, layer, x.shape)
        >>> tapped = tap({"weight": jnp.ones((3, 2))}, ["weight"], observe)
        >>> tapped["weight"].apply(jnp.ones((4, 2))).shape
        weight None (4, 2)
        (4, 3)
    """

    def leaf(name: str, parameter: Array | Mixture) -> Array | Lazy:
        if name not in names:
            return parameter
        layer = None
        if is_stacked(name):
            layer = jnp.arange(len(jax.tree.leaves(parameter)[0]))
        return Tap(parameter, layer, name, observe)

    return {name: leaf(name, parameter) for name, parameter in parameters.items()}
