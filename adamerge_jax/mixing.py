"""Mixing: `theta(lambda) = theta_base + sum_k lambda_k * tau_k`, as a lazy leaf of a pytree.

A `Mixture` goes wherever an array of parameters would go, also through `jax.lax.scan` over
stacked layers. It becomes an array only where a layer asks for its weights, so that the merged
model never exists as a whole.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.parameter_names import is_stacked, is_variance, leaf_name
from adamerge_jax.task_vectors import Delta, JoinedDelta, LowRankDelta, RowColumnDelta
from adamerge_jax.task_vectors.offload.streamed import apart_from_layers, with_sources

MERGED_WEIGHT = "merged_weight"
"""The name of a materialised mixture in a rematerialisation policy."""


class Lazy(abc.ABC):
    """A parameter that becomes an array only where a layer uses it."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "..."]:
        """Returns the parameter, `[*shape]`."""

    @abc.abstractmethod
    def apply(self, x: Float[Array, "N n"]) -> Float[Array, "N m"]:
        """Returns `x @ materialize().T`."""

    @abc.abstractmethod
    def rows(self, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns `materialize()[index]`."""

    def times(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """Returns `x * materialize()`, for the weight `[H]` of a normalisation."""
        return x * self.materialize()

    def for_all(self) -> "Array | Lazy":
        """Returns the parameter for several uses, with the work that they share done."""
        return self.materialize()


def is_lazy(leaf: object) -> bool:
    """Returns True for a leaf that is not an array yet."""
    return isinstance(leaf, Lazy)


def for_all(leaf: Array | Lazy) -> Array | Lazy:
    """Returns a parameter for several uses, with the work that they share done."""
    return leaf.for_all() if is_lazy(leaf) else leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Lazy):
    """One merged parameter that has not been computed yet.

    Attributes:
        base: The base model's parameter, `[*shape]`.
        delta: The changes of the K experts to it.
        scale: The coefficients, `[K, ...]`, broadcasting against `[K, *shape]`.
        is_variance: True for variances, of which none becomes less than the least of all models:
            coefficients whose sum is more than 1 would make some negative.

    A stacked parameter has a leading axis of length L on all three.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta, Mixture
        >>> delta = DenseDelta(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> mixture = Mixture(jnp.ones((1, 2)), delta, jnp.full((2, 1, 1), 0.5))
        >>> mixture.materialize().tolist()
        [[1.5, 1.5]]
    """

    base: Float[Array, "..."]
    delta: Delta
    scale: Float[Array, "K ..."]
    is_variance: bool = dataclasses.field(default=False, metadata={"static": True})

    def materialize(self) -> Float[Array, "..."]:
        """Returns the merged parameter, summed in float32, in the base's dtype."""
        base = self.base.astype(jnp.float32)
        merged = base + self.delta.weighted_sum(self.scale)
        if self.is_variance:
            merged = jnp.maximum(merged, least_variance(base, self.delta, self.scale))
        return checkpoint_name(merged.astype(self.base.dtype), MERGED_WEIGHT)

    def apply(self, x: Float[Array, "N n"]) -> Float[Array, "N m"]:
        """Returns `x @ materialize().T`, without the merged matrix where that is less work."""
        product = self.delta.product(x, self.scale)
        if product is None:
            return x @ self.materialize().T
        return x @ self.base.T + product

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns `materialize()[index]`; mixes the rows asked for, or all where that is less."""
        delta = self.delta.rows(index) if index.size < self.base.shape[0] else None
        if delta is None:
            return self.materialize()[index]
        scale = self.scale
        if scale.shape[1] != 1:
            scale = jnp.take(scale, index, axis=1)
        else:
            scale = scale.reshape(scale.shape[0], *(1 for _ in index.shape), *scale.shape[2:])
        return Mixture(self.base[index], delta, scale).materialize()

    def for_all(self) -> "Array | Mixture":
        """Returns the merged parameter, or itself where products need no merged matrix."""
        return self.materialize() if is_summed_once(self.delta) else self


def least_variance(
    base: Float[Array, "..."], delta: Delta, scale: Float[Array, "K ..."]
) -> Float[Array, "..."]:
    """Returns the smallest variance of each entry among the base and its K experts, `[*shape]`.

    Args:
        base: The base's variances, `[*shape]`, float32.
        delta: The changes of the K experts to them.
        scale: A scale for them, `[K, ...]`, of which the shape alone counts.
    """
    smallest = base
    for expert in range(scale.shape[0]):
        alone = jnp.zeros_like(scale).at[expert].set(1)
        smallest = jnp.minimum(smallest, base + delta.weighted_sum(alone))
    # Interference steps make changes larger than those of any model.
    return jnp.maximum(smallest, 0)


def is_summed_once(delta: Delta) -> bool:
    """Returns False for deltas of low rank, of which no merged matrix is needed."""
    if isinstance(delta, JoinedDelta):
        return any(map(is_summed_once, delta.parts))
    if isinstance(delta, RowColumnDelta):
        return is_summed_once(delta.delta)
    return not isinstance(delta, LowRankDelta)


def is_mixture(leaf: object) -> bool:
    """Returns True for a `Mixture`; for `jax.tree.map(..., is_leaf=is_mixture)`."""
    return isinstance(leaf, Mixture)


def mix(
    base: PyTree[Array], deltas: Mapping[str, Delta], scales: Mapping[str, Float[Array, "K ..."]]
) -> PyTree[Array | Mixture]:
    """Replaces every parameter that has a delta by its lazy mixture.

    Args:
        base: Parameters of the base model, any pytree.
        deltas: The experts' deltas by parameter name; parameters without one stay the base's.
        scales: One scale per entry of `deltas`, from a granularity.

    Returns:
        A pytree of the base's structure.

    Raises:
        KeyError: A parameter has a delta and no scale.

    Source: Yang et al., AdaMerging, ICLR 2024, eqs. 5 and 6.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import materialize, mix, task_vectors
        >>> base = {"kernel": jnp.zeros((1, 2)), "bias": jnp.ones(2)}
        >>> experts = [base | {"kernel": jnp.full((1, 2), size)} for size in (1.0, 10.0)]
        >>> scale = jnp.array([0.5, 0.1]).reshape(2, 1, 1)  # one coefficient per expert
        >>> mixed = mix(base, task_vectors(base, experts), {"kernel": scale})
        >>> type(mixed["kernel"]).__name__, mixed["bias"].tolist()
        ('Mixture', [1.0, 1.0])
        >>> materialize(mixed)["kernel"].tolist()
        [[1.5, 1.5]]
    """

    def leaf(path: tuple, parameter: Array) -> Array | Mixture:
        name = leaf_name(path)
        if name not in deltas:
            return parameter
        return Mixture(parameter, deltas[name], scales[name], is_variance(name))

    return jax.tree_util.tree_map_with_path(leaf, base)


def materialize(tree: PyTree[Array | Lazy]) -> PyTree[Array]:
    """Turns every lazy leaf of a tree into an array, layer by layer where it is stacked.

    Args:
        tree: The result of `mix`, or a part of it.

    Returns:
        The same pytree with arrays `[*shape]`, `[L, *shape]` where a name is stacked, in the
        dtype of the base.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta, Mixture, materialize
        >>> delta = DenseDelta(jnp.array([[2.0, 4.0]]))  # one expert, a vector
        >>> half = Mixture(jnp.zeros(2), delta, scale=jnp.full((1, 1), 0.5))
        >>> tree = {"bias": half, "other": jnp.ones(1)}
        >>> {name: array.tolist() for name, array in materialize(tree).items()}
        {'bias': [1.0, 2.0], 'other': [1.0]}
    """

    def leaf(path: tuple, parameter: Array | Lazy) -> Array:
        if not is_lazy(parameter):
            return parameter
        return _materialize_one(parameter, is_stacked(leaf_name(path)))

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_lazy)


def scale_gradient(
    mixture: Mixture, gradient: Float[Array, "..."], *, stacked: bool
) -> Float[Array, "K ..."]:
    """Returns the gradient by a mixture's scale, from that by the merged parameter.

    The task vectors are read once, a layer after the other where they are stacked.

    Args:
        mixture: The mixture.
        gradient: The gradient by what `materialize` returns, in float32.
        stacked: True for a leading axis of layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta, Mixture
        >>> from adamerge_jax.mixing import scale_gradient
        >>> delta = DenseDelta(jnp.array([[2.0, 4.0], [1.0, 0.0]]))  # two experts, a vector
        >>> mixture = Mixture(jnp.zeros(2), delta, scale=jnp.ones((2, 1)))
        >>> scale_gradient(mixture, jnp.array([1.0, 10.0]), stacked=False).ravel().tolist()
        [42.0, 1.0]
    """

    def of_one(mixture: Mixture, gradient: Float[Array, "..."]) -> Float[Array, "K ..."]:
        merge = mixture.delta.weighted_sum
        if mixture.is_variance:

            def merge(scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
                wide = mixture.base.astype(jnp.float32)
                return dataclasses.replace(mixture, base=wide, scale=scale).materialize()

        _, transposed = jax.vjp(merge, mixture.scale)
        return transposed(gradient)[0]

    if not stacked:
        return of_one(mixture, gradient)
    layers, sources = apart_from_layers(mixture)
    # Inside the loop, or all layers' task vectors would be kept for it.
    return jax.lax.map(
        lambda one: of_one(with_sources(one[0], sources), one[1]), (layers, gradient)
    )


def materialize_compiled(tree: PyTree[Array | Mixture]) -> PyTree[Array]:
    """Turns every `Mixture` in the tree into an array by a compiled function.

    For a whole model or one tensor outside another compiled function. Names are no part of what is
    compiled: tensors of one shape that are folded one after the other share a program.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_mixture)
    mixtures = [(leaf, is_stacked(leaf_name(path))) for path, leaf in leaves if is_mixture(leaf)]
    if not mixtures:
        return tree
    merged = iter(_materialize_all(*zip(*mixtures, strict=True)))
    arrays = [next(merged) if is_mixture(leaf) else leaf for _, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, arrays)


@functools.partial(jax.jit, static_argnums=1)
def _materialize_all(mixtures: tuple[Mixture, ...], stacked: tuple[bool, ...]) -> list[Array]:
    return [_materialize_one(*one) for one in zip(mixtures, stacked, strict=True)]


def _materialize_one(mixture: Lazy, stacked: bool) -> Array:
    if not stacked:
        return mixture.materialize()
    layers, sources = apart_from_layers(mixture)
    return jax.lax.map(lambda layer: with_sources(layer, sources).materialize(), layers)
