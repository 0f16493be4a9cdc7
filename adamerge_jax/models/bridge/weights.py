"""The parameters of a PyTorch model by the names that they have in its checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from adamerge_jax.mixing import Lazy, is_lazy
from adamerge_jax.models.bridge.torch_in_jax import gradients_pass, torch_in_jax


class Group(NamedTuple):
    """Parameters of a module that a checkpoint has in other pieces, such as experts one by one.

    Attributes:
        parameters: The names of the module's parameters.
        tensors: The names of the checkpoint's tensors.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]


class Weights:
    """The parameters of a model, and the checkpoint's tensors that they are made of.

    Attributes:
        shapes: Shape and dtype of the checkpoint's tensors by name.
        sources: The names of the tensors that make up each of the model's parameters.
    """

    def __init__(self, model: PreTrainedModel):
        """Reads names and shapes; tied parameters count once.

        Args:
            model: A model without values.
        """
        self._model = model
        self._tensors = {
            name: tensor.to("meta")
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.is_floating_point() and name not in tied_names(model)
        }
        saved = revert_weight_conversion(model, dict(self._tensors))
        names = {id(tensor): name for name, tensor in saved.items()}
        self._renamed = {
            parameter: names[id(tensor)]
            for parameter, tensor in self._tensors.items()
            if id(tensor) in names
        }
        self.shapes = {
            name: jax.ShapeDtypeStruct(tuple(tensor.shape), jnp.float32)
            for name, tensor in saved.items()
        }
        self._groups = self._find_groups()
        self.sources: dict[str, tuple[str, ...]] = {
            parameter: (name,) for parameter, name in self._renamed.items()
        }
        for group in self._groups:
            self.sources |= dict.fromkeys(group.parameters, group.tensors)

    def _find_groups(self) -> list[Group]:
        converted = [name for name in self._tensors if name not in self._renamed]
        groups = []
        for block in dict.fromkeys(_block_of(name) for name in converted):
            parameters = [name for name in converted if _block_of(name) == block]
            parts = revert_weight_conversion(
                self._model, {name: self._tensors[name] for name in parameters}
            )
            groups.append(Group(tuple(parameters), tuple(parts)))
        return groups

    def parameters(
        self, tensors: Mapping[str, Array | Lazy], wanted: Sequence[str]
    ) -> dict[str, Array]:
        """Returns some of the model's parameters as arrays.

        Args:
            tensors: The checkpoint's tensors by name, which may be lazy.
            wanted: The names of the model's parameters.
        """
        arrays = {
            name: _array(tensors[self._renamed[name]]) for name in wanted if name in self._renamed
        }
        for group in self._groups:
            if chosen := set(group.parameters) & set(wanted):
                whole = self._joined(group, [_array(tensors[name]) for name in group.tensors])
                arrays |= {name: whole[name] for name in chosen}
        return arrays

    def _joined(self, group: Group, parts: Sequence[Array]) -> dict[str, Array]:
        """Joins a checkpoint's tensors to parameters, as `transformers` does on loading.

        Saving moves every entry of a parameter to a place of its own, so that the transpose of
        saving is its inverse.
        """
        environment = torch_in_jax()

        def save(parameters: dict[str, Array]) -> list[Array]:
            with gradients_pass():
                saved = revert_weight_conversion(self._model, environment.j2t_iso(parameters))
            return [saved[name].jax() for name in group.tensors]

        shapes = {
            name: jax.ShapeDtypeStruct(tuple(self._tensors[name].shape), parts[0].dtype)
            for name in group.parameters
        }
        (parameters,) = jax.linear_transpose(save, shapes)(list(parts))
        return parameters


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Returns the names of tied parameters, each with the one that it is tied to.

    A class that does not call `post_init` ties none.
    """
    return getattr(model, "all_tied_weights_keys", {})


def _block_of(name: str) -> str:
    """Returns the name up to its last number: the block that a parameter is in."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else name.rpartition(".")[0]


def _array(leaf: Any) -> Array:
    return leaf.materialize() if is_lazy(leaf) else leaf
