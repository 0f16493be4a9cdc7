"""Models in memory as the stages of a pipeline see opened checkpoints."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adamerge_jax.coefficients.file import Source
from adamerge_jax.coefficients.granularities import Shapes
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import InputError
from adamerge_jax.learning.forward import Forward
from adamerge_jax.mixing import materialize
from adamerge_jax.models.family import Family, HeadForm
from adamerge_jax.models.problem import CLASSES, Problem
from adamerge_jax.objectives import TargetSpec, TaskOutputs
from adamerge_jax.own_model.data import unwrap
from adamerge_jax.own_model.leaves import Leaves
from adamerge_jax.parameter_names import tensors_of, unstacked_shapes


def _no_module(*_: Any) -> Any:
    raise NotImplementedError("a model in memory runs by its user's forward")


OWN_MODEL = Family(
    backbone=_no_module,
    head=_no_module,
    prefixes=(),
    inputs=(),
    max_tokens=lambda config: None,
    heads=lambda config: {},
    auto_class=None,
    last_layer=None,
)
"""The family of models in memory, of which nothing is known."""


class Tensors(NamedTuple):
    """The tensors of a model.

    Attributes:
        shapes: Their shapes, by names without `*`.
    """

    shapes: Shapes

    @property
    def names(self) -> Iterable[str]:
        """Their names without `*`."""
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one."""
        return self.shapes[name]


@dataclasses.dataclass(frozen=True)
class OwnModels:
    """A base and its experts in memory.

    Attributes:
        sources: The origins of the models for the coefficients file: the base, then the experts.
        shapes: The shape of every parameter that is no head's, `(L, *shape)` where stacked.
        experts: The experts by name.
    """

    sources: tuple[Source, ...]
    shapes: Shapes
    experts: Mapping[str, Leaves[Any]]
    family: Family = OWN_MODEL
    devices: Devices = ONE_DEVICE
    config: None = None

    @property
    def problems(self) -> dict[str, Problem]:
        """The problem of each expert; that of classes leaves all objectives open."""
        return dict.fromkeys(self.experts, CLASSES)

    def head_form(self, task: str) -> HeadForm:
        """Returns the form of a task's head, of which nothing is known."""
        return self.family.head_form()

    @property
    def base(self) -> Tensors:
        """The tensors of the base."""
        return Tensors(unstacked_shapes(self.shapes))

    def tensors(self, name: str) -> list[str]:
        """Returns the names of the tensors that make up a parameter."""
        return tensors_of(name, self.shapes[name])


class OwnWorkspace(NamedTuple):
    """A base and its experts in memory, and the user's function that runs them.

    Attributes:
        models: The base and the experts.
        base: The base's leaves.
        run: The user's `forward(model, inputs)`.
        heads: The parameters that each task keeps, by task and name.
    """

    models: OwnModels
    base: Leaves[Any]
    run: Callable[[Any, Any], Any]
    heads: Mapping[str, Mapping[str, Array]]

    def forward(self, specs: Iterable[TargetSpec]) -> Forward:
        """Returns the function that runs the merged model on the examples of all tasks.

        Where tasks keep parameters of their own, it runs once for each of them.
        """
        tasks, has_heads = len(self.heads), any(self.heads.values())

        def forward(parameters: PyTree, heads: PyTree, inputs: PyTree) -> Sequence[TaskOutputs]:
            merged = materialize(parameters)
            if not has_heads:
                return _split(self.outputs(merged, inputs), tasks)
            parts = _split(inputs, tasks)
            return [
                self.outputs({**merged, **head}, part)
                for head, part in zip(heads, parts, strict=True)
            ]

        return forward

    def outputs(self, arrays: Mapping[str, Array], inputs: Mapping[str, Array]) -> TaskOutputs:
        """Runs the user's function on a model of these arrays.

        Args:
            arrays: All arrays of the model by name.
            inputs: Inputs by name, `[B, ...]`.

        Raises:
            InputError: It returns something else than logits of the B examples.
        """
        result = self.run(self.base.rebuild(arrays), unwrap(inputs))
        outputs = result if isinstance(result, TaskOutputs) else TaskOutputs(result)
        size, logits = len(next(iter(inputs.values()))), outputs.logits
        shape = getattr(logits, "shape", None)
        if shape is None or not 2 <= len(shape) <= 3 or shape[0] != size:
            found = type(logits).__name__ if shape is None else f"shape {shape}"
            raise InputError(
                f"forward: returned {found} for {size} examples, expected logits [{size}, C], "
                f"[{size}, T, V] for tokens, or TaskOutputs with them"
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise InputError(f"forward: returned {logits.dtype}, expected floating-point logits")
        return outputs


def _split(tree: PyTree, parts: int) -> list[PyTree]:
    """Cuts all arrays of a tree, `[parts * B, ...]`, into parts `[B, ...]`."""
    size = len(jax.tree.leaves(tree)[0]) // parts
    return [
        jax.tree.map(lambda array, start=start: array[start : start + size], tree)
        for start in range(0, parts * size, size)
    ]
