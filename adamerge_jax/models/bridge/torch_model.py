"""A PyTorch model as a function of its parameters; its layers are computed again backwards."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import torch
from jaxtyping import Array
from torch.utils import _pytree
from transformers import PreTrainedModel, masking_utils, pytorch_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from adamerge_jax.mixing import Lazy
from adamerge_jax.models.bridge.assertions import without_assertions_of_values
from adamerge_jax.models.bridge.experts import loops_over_experts, over_all_experts
from adamerge_jax.models.bridge.torch_in_jax import (
    custom_functions_have_gradients,
    is_in_jax,
    torch_in_jax,
)
from adamerge_jax.models.bridge.weights import Weights, tied_names
from adamerge_jax.models.layers import POLICIES
from adamerge_jax.models.rematerialization import Rematerialize


class Slot(NamedTuple):
    """A place in a module that holds a tensor.

    Attributes:
        holder: The module's parameters, buffers or attributes.
        key: The name there.
    """

    holder: dict[str, Any]
    key: str


class TorchModel:
    """Runs a model of `transformers` with given parameters, as JAX.

    Attributes:
        model: The model, without values.
        weights: Its parameters by their names in a checkpoint.
    """

    def __init__(self, model: PreTrainedModel, rematerialize: Rematerialize):
        """Finds the places of parameters and constants, and the layers.

        Args:
            model: A model without values.
            rematerialize: The values that the backward pass computes again in each layer.
        """
        self.model = model
        self.weights = Weights(model)
        self._tensors: Mapping[str, Array | Lazy] = {}
        layers = dict(_layers(model)) if rematerialize != "nothing" else {}
        self._outside: dict[str, list[Slot]] = {}
        self._inside: dict[str, dict[str, list[Slot]]] = {name: {} for name in layers}
        self._constants: list[tuple[Slot, torch.Tensor]] = []
        tied = tied_names(model)
        for path, module in model.named_modules():
            if loops_over_experts(module):
                module.forward = over_all_experts(module.forward)
            layer = next((name for name in layers if f"{path}.".startswith(f"{name}.")), None)
            slots = self._outside if layer is None else self._inside[layer]
            for holder in (module._parameters, module._buffers, vars(module)):
                for key, tensor in holder.items():
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    name = f"{path}.{key}" if path else key
                    name = tied.get(name, name)
                    if name in self.weights.sources:
                        slots.setdefault(name, []).append(Slot(holder, key))
                    else:
                        self._constants.append((Slot(holder, key), tensor))
        for name, layer_module in layers.items():
            layer_module.forward = self._rematerialized(
                name, layer_module.forward, POLICIES[rematerialize]
            )

    def call(
        self,
        tensors: Mapping[str, Array | Lazy],
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
    ) -> Any:
        """Calls a function that runs modules of the model.

        Args:
            tensors: The checkpoint's tensors by name; those that are used must be there.
            function: The function.
            arguments: Its arguments by name; arrays become PyTorch's tensors.

        Returns:
            Its result, in which tensors are torchax's.
        """
        environment = torch_in_jax()
        outside = {
            name: slots
            for name, slots in self._outside.items()
            if all(tensor in tensors for tensor in self.weights.sources[name])
        }
        self._tensors = tensors
        try:
            with (
                _without_notes_of_wide_integers(),
                _without_checks_of_values(),
                _masks_by_broadcasting(),
                _without_caches_of_tensors(),
                without_assertions_of_values(self.model),
                custom_functions_have_gradients(),
                environment,
                torch.enable_grad(),  # parts of a model may stop gradients
            ):
                filling = self.weights.parameters(tensors, list(outside))
                constants = [
                    (slot, environment.j2t_iso(environment.t2j_copy(tensor)))
                    for slot, tensor in self._constants
                ]
                with filled([*_fill(outside, filling), *constants]):
                    return function(**environment.j2t_iso(dict(arguments)))
        finally:
            self._tensors = {}

    def _rematerialized(
        self, layer: str, forward: Callable[..., Any], policy: Callable[..., bool]
    ) -> Callable[..., Any]:
        """Returns a layer's forward whose parameters are mixed inside, and again backwards."""
        environment = torch_in_jax()
        slots = self._inside[layer]
        sources = {tensor for name in slots for tensor in self.weights.sources[name]}

        def run_layer(*arguments: Any, **options: Any) -> Any:
            leaves, structure = _pytree.tree_flatten((arguments, options))
            # A plain tensor is known on the host, and stays so.
            is_tensor = [is_in_jax(leaf) for leaf in leaves]
            shape_of_result: list[Any] = []

            def run(tensors: dict[str, Array | Lazy], arrays: list[Array]) -> list[Array]:
                rest = iter(environment.j2t_iso(arrays))
                given = [
                    next(rest) if tensor else leaf
                    for leaf, tensor in zip(leaves, is_tensor, strict=True)
                ]
                arguments, options = _pytree.tree_unflatten(given, structure)
                with filled(_fill(slots, self.weights.parameters(tensors, list(slots)))):
                    result = forward(*arguments, **options)
                results, result_structure = _pytree.tree_flatten(result)
                shape_of_result[:] = [
                    [None if is_in_jax(leaf) else (leaf,) for leaf in results],
                    result_structure,
                ]
                return environment.t2j_iso([leaf for leaf in results if is_in_jax(leaf)])

            arrays = environment.t2j_iso([leaf for leaf in leaves if is_in_jax(leaf)])
            tensors = {name: self._tensors[name] for name in sorted(sources)}
            results = iter(environment.j2t_iso(jax.checkpoint(run, policy=policy)(tensors, arrays)))
            others, result_structure = shape_of_result
            return _pytree.tree_unflatten(
                [next(results) if other is None else other[0] for other in others],
                result_structure,
            )

        return run_layer


@contextmanager
def _without_notes_of_wide_integers() -> Iterator[None]:
    """Silences JAX about PyTorch's 64-bit integers, which are indices here and fit into 32 bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype (u?int|float)64")
        yield


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """Keeps code from checking values, which are unknown while a function is compiled."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    validates = torch.distributions.Distribution._validate_args
    os.environ[name] = "1"
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _without_caches_of_tensors() -> Iterator[None]:
    """Keeps models from storing tensors, such as positions, which belong to one compilation."""
    before = pytorch_utils.is_torchdynamo_compiling
    pytorch_utils.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        pytorch_utils.is_torchdynamo_compiling = before


@contextmanager
def _masks_by_broadcasting() -> Iterator[None]:
    """Has `transformers` make attention masks by broadcasting, not by PyTorch's `vmap`.

    That knows nothing of JAX. Masks are functions of positions, which broadcast as they are.
    """

    def broadcast(mask: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*positions: torch.Tensor) -> torch.Tensor:
            made = mask(*masking_utils._non_vmap_expansion_sdpa(*positions))
            return made.expand([len(axis) for axis in positions])

        return make

    before = masking_utils._vmap_expansion_sdpa
    masking_utils._vmap_expansion_sdpa = broadcast
    try:
        yield
    finally:
        masking_utils._vmap_expansion_sdpa = before


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the outermost layers that `transformers` computes again where asked to."""
    outermost = ""
    for name, module in model.named_modules():
        if outermost and name.startswith(outermost):
            continue
        if isinstance(module, GradientCheckpointingLayer):
            outermost = f"{name}."
            yield name, module


def _fill(
    slots: Mapping[str, list[Slot]], arrays: Mapping[str, Array]
) -> list[tuple[Slot, torch.Tensor]]:
    environment = torch_in_jax()
    return [
        (slot, environment.j2t_iso(arrays[name]))
        for name, of_parameter in slots.items()
        for slot in of_parameter
    ]


@contextmanager
def filled(contents: Sequence[tuple[Slot, torch.Tensor | None]]) -> Iterator[None]:
    """Puts tensors, or None, into their places, and what was there back at the end."""
    before = [slot.holder[slot.key] for slot, _ in contents]
    for slot, tensor in contents:
        slot.holder[slot.key] = tensor
    try:
        yield
    finally:
        for (slot, _), tensor in zip(contents, before, strict=True):
            slot.holder[slot.key] = tensor
