"""The backbone and the head of a PyTorch model, as functions of their parameters."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adamerge_jax.mixing import Lazy
from adamerge_jax.models.bridge.images import TOKENS, TorchImages
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax
from adamerge_jax.models.bridge.torch_model import TorchModel
from adamerge_jax.models.family import Network
from adamerge_jax.models.layers import Outputs
from adamerge_jax.models.rematerialization import Rematerialize


class TorchBackbone(Network):
    """The part of a model that is merged: `(parameters, inputs, hidden_states=False) -> Outputs`.

    Attributes:
        shapes: Shape and dtype of every parameter by its name in a checkpoint.
        inputs: The names of the arrays that the model reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rematerialize: Rematerialize,
        *,
        language: bool,
        images: TorchImages | None = None,
    ):
        """Keeps the parameters under `model.base_model`, or all of a language model.

        Args:
            model: A model with a head, without values.
            rematerialize: The values that the backward pass computes again.
            language: True for a language model, whose output layer is merged.
            images: The images of a language model that reads some.
        """
        self._images = images
        self._torch = TorchModel(model, rematerialize)
        self._body = model.base_model
        in_head = set() if language else _names_of_head(model, self._torch)
        shapes = self._torch.weights.shapes
        self.shapes = {name: leaf for name, leaf in shapes.items() if name not in in_head}
        self.inputs = tuple(inspect.signature(type(self._body).forward).parameters)

    def __call__(
        self,
        parameters: Mapping[str, Array | Lazy],
        inputs: Mapping[str, Array],
        hidden_states: bool = False,
    ) -> Outputs:
        """Runs the model without its head."""
        if self._images is None:
            given, forward, of_tokens = inputs, self._body.forward, dict(inputs)
        else:
            given, forward = self._images.arguments(inputs), self._images.forward(self._body)
            # A head of tokens has no use for images.
            of_tokens = {name: array for name, array in inputs.items() if name in TOKENS}
        arguments: dict[str, Any] = {
            name: _as_dtype_of(parameters, array) for name, array in given.items()
        }
        if hidden_states:
            arguments["output_hidden_states"] = True
        result = self._torch.call(parameters, forward, arguments)
        pooled = getattr(result, "pooler_output", None)
        states = None
        if hidden_states:
            # An encoder with a decoder has states of both; the decoder's lead to its logits.
            chosen = getattr(result, "decoder_hidden_states", None) or result.hidden_states
            states = jnp.stack([state.jax() for state in chosen])
        return Outputs(
            None if pooled is None else pooled.jax(),
            result[0].jax(),
            states,
            inputs=of_tokens,
        )


class TorchHead(Network):
    """The part of a model behind its backbone: `(parameters, outputs) -> logits`.

    Attributes:
        shapes: Shape and dtype of every parameter by its name in a checkpoint.
        of_body: The names of the parameters that the base model has.
    """

    def __init__(self, model: PreTrainedModel):
        """Keeps the parameters outside of `model.base_model`, and what they are tied to.

        Args:
            model: A model with a head, without values.
        """
        self._torch = TorchModel(model, "nothing")
        self._body = model.base_model
        names = _names_of_head(model, self._torch)
        self.shapes = {name: self._torch.weights.shapes[name] for name in names}
        self.of_body = _names_of_body(model, self._torch)
        self._reads = inspect.signature(type(model).forward).parameters

    def __call__(self, parameters: Mapping[str, Array | Lazy], outputs: Outputs) -> Array:
        """Runs the head on the outputs of the backbone."""
        environment = torch_in_jax()
        body = _BodyOutput(
            last_hidden_state=environment.j2t_iso(outputs.last_hidden_state),
            pooler_output=environment.j2t_iso(outputs.pooled),
        )
        self._body.forward = lambda *arguments, **options: body
        try:
            inputs = {n: a for n, a in (outputs.inputs or {}).items() if n in self._reads}
            result = self._torch.call(parameters, self._torch.model.forward, inputs)
        finally:
            del self._body.forward
        return result.logits.jax().astype(jnp.float32)


class _BodyOutput(BaseModelOutputWithPooling):
    """The output of a base model of any kind: what it does not have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _names_of_head(model: PreTrainedModel, network: TorchModel) -> list[str]:
    """Returns the checkpoint's tensors that are read outside of the base model."""
    body = {id(module) for module in model.base_model.modules()}
    tied = model.all_tied_weights_keys
    names: list[str] = []
    for path, module in model.named_modules():
        if id(module) in body:
            continue
        for key in (*module._parameters, *module._buffers):
            name = f"{path}.{key}" if path else key
            names.extend(network.weights.sources.get(tied.get(name, name), ()))
    return list(dict.fromkeys(names))


def _names_of_body(model: PreTrainedModel, network: TorchModel) -> frozenset[str]:
    """Returns the checkpoint's tensors that the base model is made of."""
    path = next(name for name, module in model.named_modules() if module is model.base_model)
    return frozenset(
        tensor
        for parameter, tensors in network.weights.sources.items()
        if parameter.startswith(f"{path}.")
        for tensor in tensors
    )


def _as_dtype_of(parameters: Mapping[str, Any], array: Array) -> Array:
    """Returns numbers such as pixels in the dtype of the model."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    leaf = jax.tree.leaves(parameters)[0]
    return array.astype(leaf.dtype)
