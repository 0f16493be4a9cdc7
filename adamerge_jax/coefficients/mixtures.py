"""One coefficient for each expert of a mixture."""

from collections import defaultdict

import jax.numpy as jnp
from jaxtyping import Array

from adamerge_jax.coefficients.granularity import Granularity, PerTensor, Shapes, Values
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked, layer_of, tensor_shape, tensors_of


def mixture_expert(shapes: Shapes) -> Granularity:
    """One coefficient per fine-tuned expert and expert of a mixture, one per layer elsewhere.

    The experts of a mixture are tensors of their own (`mlp.experts.3.up_proj.weight`) or lie along
    the first axis of one (`mlp.experts.gate_up_proj`); coefficients are the same for both. Routers,
    attention and norms share those of their layer.

    Args:
        shapes: Shapes of the parameters.

    Raises:
        InputError: No parameter is one of a mixture's experts.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, mixture_expert
        >>> shapes = {"0.mlp.gate.weight": (2, 4)}  # the router
        >>> shapes |= {f"0.mlp.experts.{number}.up.weight": (6, 4) for number in range(2)}
        >>> values = mixture_expert(shapes).init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K, ...]
        {'0': (1, 3), '0.mlp.experts': (1, 3, 2)}
    """
    all_tensors = [tensor for name, shape in shapes.items() for tensor in tensors_of(name, shape)]
    # By parameter and layer, the group and the numbers of the experts that it has values of.
    places: dict[str, list[tuple[str, list[int] | None]]] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        places[name] = []
        for tensor in tensors_of(name, shape):
            group, experts = _experts(tensor, tensor_shape(name, shape))
            places[name].append((group or layer_of(tensor, all_tensors), experts))
            if experts is not None:
                numbers[group].update(experts)
    if shapes and not numbers:
        raise InputError(
            "no merged parameter is an expert of a mixture (*.experts.*); take another granularity"
        )
    columns = {
        group: {number: column for column, number in enumerate(sorted(of_group))}
        for group, of_group in numbers.items()
    }

    def init(start: PerTensor) -> Values:
        collected: dict[str, dict[int, list[Array]]] = defaultdict(lambda: defaultdict(list))
        for name, of_name in places.items():
            for (group, experts), values in zip(of_name, start[name], strict=True):
                for number in experts or [0]:
                    collected[group][columns.get(group, {0: 0})[number]].append(values)
        result = {}
        for group in sorted(collected):
            means = [jnp.stack(collected[group][column]) for column in sorted(collected[group])]
            # Exact where all are equal, as at a constant start.
            each = [values[0] + (values - values[0]).mean(0) for values in means]
            whole = jnp.stack(each, axis=-1) if group in columns else each[0]
            result[group] = whole[None].astype(jnp.float32)
        return result

    def of_tensor(group: str, experts: list[int] | None, axes: int, values: Values) -> Array:
        if experts is None:
            scale = values[group][0][:, None]
        else:
            scale = values[group][0][:, jnp.array([columns[group][number] for number in experts])]
        return scale.reshape(*scale.shape[: axes + 1], *(1 for _ in range(axes - 1)))

    def scale(name: str, values: Values) -> Array:
        axes = len(tensor_shape(name, shapes[name]))
        layers = [of_tensor(group, experts, axes, values) for group, experts in places[name]]
        return jnp.stack(layers) if is_stacked(name) else layers[0]

    return Granularity(
        init,
        lambda values: {name: scale(name, values) for name in shapes},
        units={
            name: "by layer" if of_name[0][1] is None else "by expert of a mixture"
            for name, of_name in places.items()
        },
    )


def _experts(name: str, shape: tuple[int, ...]) -> tuple[str, list[int] | None]:
    """Returns the mixture that a tensor belongs to and the numbers of its experts in it.

    A tensor outside of mixtures has no numbers.
    """
    before, dot, after = name.rpartition(".experts.")
    number, *rest = after.split(".")
    if dot and number.isdecimal() and rest:
        return f"{before}.experts", [int(number)]
    if dot and not rest and len(shape) >= 2:
        return f"{before}.experts", list(range(shape[0]))
    return "", None
