"""The backbone and the head of a PyTorch model, as functions of their parameters."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float

from adamerge_jax.mixing import Lazy
from adamerge_jax.models.bridge.body import Body, BodyOutput
from adamerge_jax.models.bridge.images import TOKENS, TorchImages
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax
from adamerge_jax.models.bridge.torch_model import Slot, TorchModel, filled
from adamerge_jax.models.bridge.weights import tied_names
from adamerge_jax.models.family import Network
from adamerge_jax.models.layers import Outputs
from adamerge_jax.models.rematerialization import Rematerialize


class TorchBackbone(Network):
    """The part of a model that is merged: `(parameters, inputs, hidden_states=False) -> Outputs`.

    Attributes:
        shapes: Shape and dtype of every parameter by its name in a checkpoint.
        inputs: The names of the arrays that the model reads.
        batch_statistics: The names of the means and variances that its batch normalisations keep.
    """

    def __init__(
        self,
        body: Body,
        rematerialize: Rematerialize,
        *,
        language: bool,
        images: TorchImages | None = None,
    ):
        """Keeps the parameters of the body, or all of a language model.

        Args:
            body: The body of a model without values.
            rematerialize: The values that the backward pass computes again.
            language: True for a language model, whose output layer is merged.
            images: The images of a language model that reads some.
        """
        self._images = images
        self._torch = TorchModel(body.model, rematerialize)
        self._body = body
        in_head = set() if language else _names_of_head(body, self._torch)
        shapes = self._torch.weights.shapes
        self.shapes = {name: leaf for name, leaf in shapes.items() if name not in in_head}
        self.inputs = tuple(inspect.signature(type(body.module).forward).parameters)
        self._normalisations = _batch_normalisations(self._torch, self.shapes)
        self.batch_statistics = frozenset(
            name for normalisation in self._normalisations.values() for name in normalisation
        )

    def statistics_of(
        self, parameters: Mapping[str, Array | Lazy], inputs: Mapping[str, Array]
    ) -> dict[str, Float[Array, " C"]]:
        """Returns mean and variance of what each batch normalisation reads of a batch.

        Each normalises by these, as in training; the variance is the unbiased one, as PyTorch
        keeps it. The parameters in `batch_statistics` are not used.
        """
        read: dict[str, Array] = {}

        def note(names: tuple[str, str], module: torch.nn.Module, arguments: tuple) -> None:
            channels_last = arguments[0].float().movedim(1, -1)
            rows = channels_last.reshape(-1, channels_last.shape[-1])
            read.update(zip(names, (rows.mean(0).jax(), rows.var(0).jax()), strict=True))

        hooks = [
            module.register_forward_pre_hook(partial(note, names))
            for module, names in self._normalisations.items()
        ]
        kept = [Slot(module._buffers, key) for module in self._normalisations for key in _KEPT]
        others = {name: p for name, p in parameters.items() if name not in self.batch_statistics}
        try:
            with filled([(slot, None) for slot in kept]):
                self(others, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return read

    def __call__(
        self,
        parameters: Mapping[str, Array | Lazy],
        inputs: Mapping[str, Array],
        hidden_states: bool = False,
    ) -> Outputs:
        """Runs the model without its head."""
        if self._images is None:
            given, forward, of_tokens = inputs, self._body.module.forward, dict(inputs)
        else:
            given = self._images.arguments(inputs)
            forward = self._images.forward(self._body.module)
            # A head of tokens has no use for images.
            of_tokens = {name: array for name, array in inputs.items() if name in TOKENS}
        arguments: dict[str, Any] = {
            name: _as_dtype_of(parameters, array) for name, array in given.items()
        }
        if hidden_states:
            arguments["output_hidden_states"] = True

        def run(**arguments: Any) -> Any:
            return self._body.run(forward, arguments)

        result = self._torch.call(parameters, run, arguments)
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

    def __init__(self, body: Body):
        """Keeps the parameters outside of the body, and what they are tied to.

        Args:
            body: The body of a model without values.
        """
        self._torch = TorchModel(body.model, "nothing")
        self._body = body
        names = _names_of_head(body, self._torch)
        self.shapes = {name: self._torch.weights.shapes[name] for name in names}
        self.of_body = frozenset(_names_under(body, self._torch, in_body=True))

    def __call__(self, parameters: Mapping[str, Array | Lazy], outputs: Outputs) -> Array:
        """Runs the head on the outputs of the backbone."""
        environment = torch_in_jax()
        output = BodyOutput(
            last_hidden_state=environment.j2t_iso(outputs.last_hidden_state),
            pooler_output=environment.j2t_iso(outputs.pooled),
        )
        inputs = {n: a for n, a in (outputs.inputs or {}).items() if n in self._body.reads}

        def run(**arguments: Any) -> Any:
            return self._body.run_head(output, arguments)

        logits = self._torch.call(parameters, run, inputs)
        return logits.jax().astype(jnp.float32)


def _batch_normalisations(
    network: TorchModel, shapes: Mapping[str, object]
) -> dict[torch.nn.Module, tuple[str, str]]:
    """Returns the batch normalisations, each with the names of its mean and its variance."""
    sources = network.weights.sources
    found = {}
    for path, module in network.model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            mean, variance = (sources.get(f"{path}.{key}", ("",))[0] for key in _KEPT)
            if mean in shapes and variance in shapes:
                found[module] = (mean, variance)
    return found


_KEPT = ("running_mean", "running_var")
"""The statistics that a batch normalisation of PyTorch keeps."""


def _as_dtype_of(parameters: Mapping[str, Any], array: Array) -> Array:
    """Returns numbers such as pixels in the dtype of the model."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    leaf = jax.tree.leaves(parameters)[0]
    return array.astype(leaf.dtype)


def _names_of_head(body: Body, network: TorchModel) -> list[str]:
    """Returns the checkpoint's tensors that are read outside of the body."""
    return _names_under(body, network, in_body=False)


def _names_under(body: Body, network: TorchModel, *, in_body: bool) -> list[str]:
    """Returns the checkpoint's tensors that modules read, inside the body or outside of it."""
    tied = tied_names(body.model)
    names: list[str] = []
    for path, module in body.model.named_modules():
        if body.has(path) != in_body:
            continue
        for key in (*module._parameters, *module._buffers):
            name = f"{path}.{key}" if path else key
            names.extend(network.weights.sources.get(tied.get(name, name), ()))
    return list(dict.fromkeys(names))
