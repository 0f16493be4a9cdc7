"""Granularities of whole tensors: all together, by layer, one by one, by groups of names."""

from collections.abc import Mapping, Sequence

from adamerge_jax.coefficients.granularity import (
    Granularity,
    Shapes,
    group_tensors,
    split_tensors,
)
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked, layer_of, matches, tensors_of


def task(shapes: Shapes) -> Granularity:
    """One coefficient per expert: task-wise AdaMerging (Yang et al., 2024, eq. 5).

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, task
        >>> shapes = {"a.weight": (4, 3), "b.weight": (2, 4)}
        >>> task(shapes).init(constant(shapes, experts=3, value=0.3))["all"].shape  # [G, K]
        (1, 3)
    """
    return group_tensors(shapes, lambda tensor: "all", "all together")


def layer(shapes: Shapes) -> Granularity:
    """One coefficient per expert and layer.

    A numbered block is a layer. So is each module beside the blocks: embeddings, a final norm, a
    pooler, a projection.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, layer
        >>> shapes = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "norm.weight": (4,)}
        >>> values = layer(shapes).init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K] by layer
        {'layers.0': (1, 3), 'norm': (1, 3)}
    """
    tensors = [tensor for name, shape in shapes.items() for tensor in tensors_of(name, shape)]
    return group_tensors(shapes, lambda tensor: layer_of(tensor, tensors), "by layer")


def tensor(shapes: Shapes) -> Granularity:
    """One coefficient per expert and parameter tensor: AdaMerging's "layer-wise" (eq. 6).

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, tensor
        >>> shapes = {"layers.*.weight": (12, 4, 3)}  # stacked: 12 layers
        >>> tensor(shapes).init(constant(shapes, experts=3, value=0.3))["layers.*.weight"].shape
        (12, 3)
    """
    return split_tensors(shapes, lambda name, shape: None)


def groups(shapes: Shapes, patterns: Mapping[str, Sequence[str]]) -> Granularity:
    """One coefficient per expert and group of parameters that name patterns pick.

    Args:
        shapes: Shapes of the parameters.
        patterns: By group, patterns such as `*.attention.*` or `encoder.layer.3.*`; the first
            group that fits a parameter's name (without `*`) takes it. A parameter that fits none
            is in the group `others`.

    Raises:
        InputError: A group's patterns are no list of texts, or it is called like a stack of layers.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, groups
        >>> shapes = {"0.attention.weight": (4, 4), "0.mlp.weight": (4, 4), "norm.weight": (4,)}
        >>> granularity = groups(shapes, {"attention": ["*.attention.*"]})
        >>> values = granularity.init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K]
        {'attention': (1, 3), 'others': (1, 3)}
    """
    if not isinstance(patterns, Mapping):
        raise InputError(
            f"patterns is {patterns!r}, expected lists of name patterns by group: "
            "{attention: ['*.attention.*']}"
        )
    for group, of_group in patterns.items():
        if not isinstance(group, str):
            raise InputError(f"a group is called {group!r}, expected a text; put it in quotes")
        if not isinstance(of_group, list | tuple) or not all(isinstance(p, str) for p in of_group):
            raise InputError(
                f"the patterns of {group!r} are {of_group!r}, expected a list of texts"
            )
        if is_stacked(group):
            raise InputError(f"a group cannot be called {group!r}; give it a name without '*'")

    def group_of(name: str) -> str:
        return next((group for group in patterns if matches(name, patterns[group])), "others")

    return group_tensors(shapes, group_of, "by group")
