"""The part of a PyTorch model before its head, and the head behind it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adamerge_jax.errors import InputError


class NotDividedError(InputError):
    """A model that cannot be divided in this way."""


class Body(Protocol):
    """A way to divide a model into a body, which is merged, and a head.

    Attributes:
        model: The model.
        module: The module whose forward reads a batch.
        reads: The names of the arguments of the model's own forward that its head may read.
    """

    model: PreTrainedModel
    module: torch.nn.Module
    reads: frozenset[str]

    def has(self, path: str) -> bool:
        """Returns True for the path of a module of the body."""
        ...

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Returns the body's output.

        Args:
            forward: The forward of `module`, or one that takes its place.
            arguments: Its arguments by name.
        """
        ...

    def run_head(self, output: "BodyOutput", arguments: Mapping[str, Any]) -> torch.Tensor:
        """Returns the logits from the body's output.

        Args:
            output: The output.
            arguments: The arguments of the model's own forward, those that a head may read.
        """
        ...


class BodyOutput(BaseModelOutputWithPooling):
    """The output of a body of any kind: what it does not have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class BaseModel:
    """The body of most models: their `base_model`, which their forward calls."""

    def __init__(self, model: PreTrainedModel):
        """Takes a model without values."""
        self.model = model
        self.module: torch.nn.Module = model.base_model
        self.reads = frozenset(inspect.signature(type(model).forward).parameters)
        inside = {id(module) for module in self.module.modules()}
        self._paths = {path for path, module in model.named_modules() if id(module) in inside}

    def has(self, path: str) -> bool:
        """Returns True for the path of a module of the base model."""
        return path in self._paths

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Returns what the forward returns."""
        return forward(**arguments)

    def run_head(self, output: BodyOutput, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Runs the model's forward, in which the body gives this output.

        Raises:
            NotDividedError: The forward does not call the base model, but parts of it.
        """
        was_called = False

        def give(*_: Any, **__: Any) -> BodyOutput:
            nonlocal was_called
            was_called = True
            return output

        self.module.forward = give
        try:
            result = self.model.forward(**arguments)
        finally:
            del self.module.forward
        if not was_called:
            raise NotDividedError("the forward of the whole model does not call its base model")
        return result.logits


class LastEndToken(BaseModel):
    """The body of a classifier that takes the state of a text's last end token, as BART's does.

    How many end tokens a batch has is not known while a function is compiled, so that the token is
    looked for here, and the layers behind it are run alone.
    """

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Returns what the forward returns; the decoder reads the text shifted by one token."""
        if hasattr(self.model, "_shift_right"):  # a BART does so by itself
            decoded = self.model._shift_right(arguments["input_ids"])
            arguments = {**arguments, "decoder_input_ids": decoded}
        return super().run(forward, arguments)

    def run_head(self, output: BodyOutput, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Returns the logits of each text's last end token; NaN for a text that has none."""
        tokens = arguments["input_ids"]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(tokens == self.model.config.eos_token_id, places, -1).amax(1)
        is_last = (places == last[:, None])[..., None]
        state = torch.where(is_last, output.last_hidden_state, 0).sum(1)
        state = torch.where(last[:, None] < 0, torch.nan, state)
        return self.model.classification_head(state)


class AllButLastLayer:
    """The body of a model whose output is that of its last layer: all before that layer.

    The model's forward is run with that layer left out, so that its logits are the layer's input.
    """

    def __init__(self, model: PreTrainedModel):
        """Takes a model without values that has such a layer."""
        found = _output_layer(model)
        assert found is not None  # see `bodies_of`
        self._path, self._layer = found
        self.model = model
        self.module: torch.nn.Module = model
        self.reads: frozenset[str] = frozenset()

    def has(self, path: str) -> bool:
        """Returns True for the path of a module other than the last layer."""
        return path != self._path

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Runs the model up to its last layer.

        Raises:
            NotDividedError: The output of the model is not that of the layer.
        """
        features: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            features.append(value)
            return value

        self._layer.forward = keep
        try:
            result = forward(**arguments)
        finally:
            del self._layer.forward
        if len(features) != 1 or result.logits is not features[0]:
            raise NotDividedError(f"the output of the model is not that of its layer {self._path}")
        return result

    def run_head(self, output: BodyOutput, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Runs the last layer."""
        return self._layer.forward(output.last_hidden_state)


_CLASSIFIED_BY_THEIR_END = frozenset(
    ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")
)
"""Types of models whose classifiers take the state of a text's last end token."""


def bodies_of(model: PreTrainedModel) -> list[type[BaseModel] | type[AllButLastLayer]]:
    """Returns the ways in which a model may be divided, the best first."""
    is_by_end = model.config.model_type in _CLASSIFIED_BY_THEIR_END
    if is_by_end and type(model).__name__.endswith("ForSequenceClassification"):
        return [LastEndToken]
    ways: list[type[BaseModel] | type[AllButLastLayer]] = []
    if model.base_model is not model:
        ways.append(BaseModel)
    if _output_layer(model) is not None:
        ways.append(AllButLastLayer)
    return ways


def _output_layer(model: PreTrainedModel) -> tuple[str, torch.nn.Linear] | None:
    """Returns path and module of a language model's output layer, or the last one for classes."""
    output = model.get_output_embeddings()
    found = None
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        is_last = module.out_features == model.config.num_labels if output is None else False
        if module is output or is_last:
            found = path, module
    return found
