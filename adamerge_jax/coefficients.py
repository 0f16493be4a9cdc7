"""Merge coefficients: which parameters share one, which values it may take, and their file.

Coefficients live in a dictionary from group name to an array `[G, K, ...]`: G groups of one
stack of layers (1 where nothing is stacked), K experts. A *granularity* decides on the groups, a
*constraint* on the values. Both are small pairs of pure functions.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adamerge_jax.errors import InputError
from adamerge_jax.names import STACKED, is_stacked, unstack

Values = Mapping[str, Float[Array, "G K ..."]]
"""Coefficients (or what a constraint maps to them) by group."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter shapes by name, `(L, *shape)` where the name is stacked."""


class Granularity(NamedTuple):
    """Which parameters share a coefficient.

    Attributes:
        init: `(experts, value) -> Values`, every coefficient set to `value`.
        scales: `Values -> {parameter name: scale}`, each scale `[K, ...]` (`[L, K, ...]` where the
            parameter is stacked), broadcasting against the K deltas of the parameter.
    """

    init: Callable[[int, float], Values]
    scales: Callable[[Values], dict[str, Float[Array, "..."]]]


def task(shapes: Shapes) -> Granularity:
    """One coefficient per expert: task-wise AdaMerging (Yang et al., 2024, eq. 5)."""
    return _shared(shapes, lambda name: "all")


def layer(shapes: Shapes) -> Granularity:
    """One coefficient per expert and layer.

    A numbered block is a layer. So is each module beside the blocks: embeddings, a final norm, a
    pooler, a projection.
    """
    return _shared(shapes, lambda name: layer_of(name, shapes))


def tensor(shapes: Shapes) -> Granularity:
    """One coefficient per expert and parameter tensor: AdaMerging's "layer-wise" (eq. 6)."""
    return _shared(shapes, lambda name: name)


GRANULARITIES: dict[str, Callable[[Shapes], Granularity]] = {
    "task": task,
    "layer": layer,
    "tensor": tensor,
}
"""Granularities by their names in a recipe."""


def _shared(shapes: Shapes, group_of: Callable[[str], str]) -> Granularity:
    """A granularity with whole tensors in its groups."""
    groups = {name: group_of(name) for name in shapes}
    sizes = {group: shapes[name][0] if is_stacked(group) else 1 for name, group in groups.items()}

    def init(experts: int, value: float) -> Values:
        return {
            group: jnp.full((size, experts), value, jnp.float32)
            for group, size in sorted(sizes.items())
        }

    def scale(name: str, values: Values) -> Float[Array, "..."]:
        shape, shared = shapes[name], values[groups[name]]
        if not is_stacked(name):
            return shared[0].reshape(-1, *(1 for _ in shape))
        shared = jnp.broadcast_to(shared, (shape[0], shared.shape[1]))
        return shared.reshape(*shared.shape, *(1 for _ in shape[1:]))

    return Granularity(init, lambda values: {name: scale(name, values) for name in shapes})


def layer_of(name: str, names: Iterable[str]) -> str:
    """The layer that a parameter belongs to, among the parameters `names` of one model.

    `encoder.layer.*.output.dense.weight` is in `encoder.layer.*`; a parameter outside the numbered
    blocks is in the outermost module that holds none of them.
    """
    block = _numbered_block(name)
    if block:
        return block
    holders = {
        ".".join(parts[:depth])
        for other in names
        if (parts := _numbered_block(other).split(".")[:-1])
        for depth in range(1, len(parts) + 1)
    }
    parts = name.split(".")
    for depth in range(1, len(parts)):
        module = ".".join(parts[:depth])
        if module not in holders:
            return module
    return name


def _numbered_block(name: str) -> str:
    """The name up to its first number (or `*`), or nothing where it has none."""
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        if part == STACKED or part.isdigit():
            return ".".join(parts[:depth])
    return ""


class Constraint(NamedTuple):
    """Which values coefficients may take.

    Attributes:
        apply: From unconstrained arrays `[G, K, ...]` to coefficients.
        invert: From coefficients to an unconstrained array that `apply` maps to them.
        allows: Whether coefficients are in the range of `apply`, as an array of K values.
        range: The range in words, for error messages.
    """

    apply: Callable[[Array], Array]
    invert: Callable[[Array], Array]
    allows: Callable[[np.ndarray], bool]
    range: str


def _clip(raw: Array) -> Array:
    """Clips to [0, 1]; the gradient is 1 on the closed interval, as that of `torch.clamp`."""
    inside = (raw >= 0) & (raw <= 1)
    return jnp.where(inside, raw, jax.lax.stop_gradient(jnp.clip(raw, 0, 1)))


CONSTRAINTS: dict[str, Constraint] = {
    "free": Constraint(lambda raw: raw, lambda values: values, lambda values: True, "any number"),
    "clip": Constraint(
        _clip,
        lambda values: values,
        lambda values: bool(((values >= 0) & (values <= 1)).all()),
        "from 0 to 1",
    ),
    "sigmoid": Constraint(
        jax.nn.sigmoid,
        lambda values: jnp.log(values) - jnp.log1p(-values),
        lambda values: bool(((values > 0) & (values < 1)).all()),
        "between 0 and 1, both excluded",
    ),
    "softmax": Constraint(
        lambda raw: jax.nn.softmax(raw, axis=1),
        jnp.log,
        lambda values: bool((values > 0).all() and np.isclose(values.sum(), 1)),
        "positive and summing to 1 over the experts (1/K each)",
    ),
}
"""Constraints by their names in a recipe; `softmax` is over the experts of a group."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: `base`, or the task of an expert.
        source: The folder or Hub id as the recipe gives it.
        revision: The Hub revision asked for, if any.
        identity: A digest of the checkpoint's contents.
    """

    name: str
    source: str
    revision: str | None
    identity: str


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Learned coefficients with all that a later merge must know of them.

    Attributes:
        values: `[K, ...]` by group, float32; groups are named without `*`, one per layer.
        granularity: Name of the granularity.
        constraint: Name of the constraint that they were learned under.
        parameters: Names of the mixed parameters, without `*`; all others stay the base's.
        base: The base model.
        experts: The K experts in the order of the last axis of the scale.
        objective: What was minimised, in words.
        seed: The recipe's seed.
        step: The step at which they were the best on the held-out calibration data.
    """

    values: Mapping[str, np.ndarray]
    granularity: str
    constraint: str
    parameters: tuple[str, ...]
    base: Source
    experts: tuple[Source, ...]
    objective: str
    seed: int
    step: int

    def scales(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """The scale `[K, ...]` of every mixed parameter, from the shapes of those parameters.

        Args:
            shapes: Shapes of `self.parameters`, by names without `*`.
        """
        granularity = GRANULARITIES[self.granularity](shapes)
        values = {group: jnp.asarray(values)[None] for group, values in self.values.items()}
        return {name: np.asarray(scale) for name, scale in granularity.scales(values).items()}

    def save(self, path: Path) -> None:
        """Writes a safetensors file: one `[K, ...]` tensor per group, the rest as metadata."""
        fields = dataclasses.asdict(self)
        del fields["values"]
        metadata = {name: json.dumps(field) for name, field in fields.items()}
        metadata |= {"format": _FORMAT, "version": version("adamerge_jax")}
        arrays = {group: np.ascontiguousarray(array) for group, array in self.values.items()}
        path.write_bytes(save(arrays, metadata))

    @classmethod
    def load(cls, path: Path) -> "Coefficients":
        """Reads a file written by `save`.

        Raises:
            InputError: There is no such file, or it is not a coefficients file.
        """
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; expected a coefficients file of an earlier run"
            )
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                values = {group: file.get_tensor(group) for group in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from error
        if metadata.pop("format", None) != _FORMAT:
            raise InputError(
                f"{path}: not a coefficients file; expected the coefficients.safetensors of a run"
            )
        del metadata["version"]
        fields: dict[str, Any] = {name: json.loads(text) for name, text in metadata.items()}
        fields["parameters"] = tuple(fields["parameters"])
        fields["base"] = Source(**fields["base"])
        fields["experts"] = tuple(Source(**expert) for expert in fields["experts"])
        return cls(values=values, **fields)


_FORMAT = "adamerge_jax coefficients 1"


def unstack_values(values: Values) -> dict[str, np.ndarray]:
    """From `[G, K, ...]` by stacked group to `[K, ...]` by the group of each layer, on the host."""
    unstacked = {}
    for group, array in values.items():
        rows = np.asarray(array, np.float32)
        names = unstack(group, len(rows)) if is_stacked(group) else [group]
        unstacked |= dict(zip(names, rows, strict=True))
    return unstacked
