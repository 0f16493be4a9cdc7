"""A model of `transformers` whose parameters take no memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from adamerge_jax.models.layers import Config


def empty_model(auto_class: str, config: Config, **options: Any) -> PreTrainedModel:
    """Returns a model in evaluation mode whose parameters have shapes and no values.

    Its buffers, such as the frequencies of rotary positions, have their values.

    Args:
        auto_class: The `transformers` class that loads such a model.
        config: The model's config, which is not changed.
        **options: Further arguments of the model's class.
    """
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.use_cache = False
            # Grouped products of experts have no counterpart in torchax.
            part._experts_implementation = "batched_mm"
    config.return_dict = True
    with _no_values():
        model = getattr(transformers, auto_class).from_config(
            config, attn_implementation="eager", **options
        )
    # Some classes are called after the part of a larger model that they are.
    if auto_class != "AutoModel" and model.base_model is model:
        parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
        if "model" in parts or len(parts) == 1:
            model.base_model_prefix = "model" if "model" in parts else parts[0]
    return model.eval().requires_grad_(False)


def empty_encoder(config: Config) -> PreTrainedModel:
    """Returns a model without a head, as `empty_model` does, and without a pooler if it has one."""
    try:
        return empty_model("AutoModel", config, add_pooling_layer=False)
    except TypeError:  # most classes have none, and no such argument
        return empty_model("AutoModel", config)


@contextmanager
def _no_values() -> Iterator[None]:
    """Puts every parameter that a module registers on the device without memory."""
    register = torch.nn.Module.register_parameter

    def register_empty(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register
