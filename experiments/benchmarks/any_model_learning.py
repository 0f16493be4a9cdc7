"""Learning of a tiny model for five steps, by JAX and by a plain PyTorch loop.

Both take the mean square between the merged model's output and the first expert's, with two
experts, a coefficient a tensor from 0.3 on, and five steps of Adam, whose `epsilon` is a thousandth
of the first step's largest gradient: gradients that are rounding alone do not move coefficients.

Where they differ in float32, both learn once more in float64: some forwards, such as those that
choose by the order of values, enlarge what float32 rounds, so that PyTorch's two precisions differ
as much.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from tiny_arguments import SIZES
from tiny_inputs import Inputs, texts_of
from torch.func import functional_call
from torch.utils import _pytree
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from adamerge_jax.coefficients.granularities import constant, tensor
from adamerge_jax.errors import InputError
from adamerge_jax.mixing import mix
from adamerge_jax.models import family_of, is_known
from adamerge_jax.models.bridge.family import kind_of
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax
from adamerge_jax.models.bridge.torch_model import TorchModel
from adamerge_jax.models.bridge.weights import tied_names
from adamerge_jax.models.family import Family, complete_head
from adamerge_jax.models.images_in_text import COUNT, PIXELS
from adamerge_jax.models.images_in_text import SIZES as SIZES_OF_IMAGES
from adamerge_jax.parameter_names import is_stacked, tensors_of
from adamerge_jax.task_vectors import DenseDelta

EXPERTS, STEPS, START, RATE, NOISE = 2, 5, 0.3, 0.02, 0.01
TOLERANCE = 1e-4

Arrays = dict[str, np.ndarray]


class NotLearnedError(Exception):
    """A model whose learning cannot be compared, with the reason."""


class InJax(NamedTuple):
    """A model as a JAX function.

    Attributes:
        way: `own`, `bridge`, or `whole`: the whole forward by the bridge, of a class for which
            recipes have no kind.
        shapes: Shapes of the merged parameters by name, `[L, *shape]` where stacked.
        forward: `(parameters, head_tensors, inputs) -> output`.
        head_tensors: The tensors of a head, which are not merged.
        inputs: Its arrays.
    """

    way: str
    shapes: Mapping[str, tuple[int, ...]]
    forward: Callable[..., jax.Array]
    head_tensors: Arrays
    inputs: Mapping[str, Any]


def learn(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """Learns by JAX and by PyTorch, and returns the way, the difference and the seconds.

    Where recipes refuse the model, `recipe` is their reason. Where `difference` is one of float64,
    `in_float32` is the other.

    Raises:
        NotLearnedError: PyTorch's own loop cannot run, or says nothing.
        InputError: The package refuses the model.
    """
    outcome = _learn_once(model, inputs)
    if outcome["difference"] <= TOLERANCE:
        return outcome
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tensors that a forward makes
    try:
        with jax.enable_x64(True):
            again = _learn_once(model.double(), wide)
    finally:
        torch.set_default_dtype(default)
    return again | {"compile": outcome["compile"], "in_float32": outcome["difference"]}


def _learn_once(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """Learns by JAX and by PyTorch in the dtype of the model."""
    if is_known(model.config) and family_of(model.config).auto_class is None:
        # A CLIP is learned by its images; its texts are names of classes.
        read = model.get_image_features
        model.forward = lambda **images: (read(**images).pooler_output,)
        inputs = {"pixel_values": inputs["pixel_values"]}
    module, in_jax, refusal = _in_jax(model, inputs)
    deltas = module.deltas(
        {name for n, shape in in_jax.shapes.items() for name in tensors_of(n, shape)}
    )
    expected, epsilon, target = module.learn(deltas)
    values, seconds = _learn_in_jax(in_jax, module.saved, deltas, target, epsilon)
    rows = {
        name: values[parameter][place]
        for parameter, shape in in_jax.shapes.items()
        for place, name in enumerate(tensors_of(parameter, shape))
    }
    difference = max(float(np.abs(rows[name] - row).max()) for name, row in expected.items())
    moved = max(float(np.abs(row - START).max()) for row in expected.values())
    return {
        **({} if refusal is None else {"recipe": refusal}),
        "inputs": sorted(in_jax.inputs),
        "way": in_jax.way,
        "difference": difference,
        "moved": round(moved, 4),
        "compile": round(seconds, 2),
    }


class Reference:
    """A model's PyTorch forward as a function of a checkpoint's tensors.

    Attributes:
        model: The model.
        saved: The tensors of its checkpoint.
        index: The place of the output among all that the forward returns; None for logits.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs):
        """Runs the forward once, and finds the output to compare.

        Raises:
            NotLearnedError: The forward draws random numbers, or nothing that it returns is finite
                or has a gradient.
        """
        self.model, self.inputs = model, inputs
        self._parameters = {
            name: value.detach()
            for name, value in model.state_dict(keep_vars=True).items()
            if value.is_floating_point() and name not in tied_names(model)
        }
        saved = revert_weight_conversion(model, dict(self._parameters))
        self.saved = {name: value.numpy() for name, value in saved.items()}
        self._origins = self._find_origins(saved)
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            results.append(model(**inputs))
        self.index = _index_of_output(*results)
        if not torch.isfinite(output_of(results[0], self.index)).all():
            raise NotLearnedError("its output is not finite")

    def _find_origins(
        self, saved: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[list[str], torch.Tensor | None]]:
        """Returns, by parameter, the tensors that it is made of and the one of each entry."""
        names = {id(value): name for name, value in saved.items()}
        origins: dict[str, tuple[list[str], torch.Tensor | None]] = {}
        numbered, start = {}, 0
        for name, value in self._parameters.items():
            if id(value) in names:
                origins[name] = ([names[id(value)]], None)
                continue
            stop = start + value.numel()
            numbered[name] = torch.arange(start, stop, dtype=torch.float64).reshape(value.shape)
            start = stop
        pieces = list(revert_weight_conversion(self.model, dict(numbered)).items())
        owner = torch.zeros(start, dtype=torch.long)
        for number, (_, entries) in enumerate(pieces):
            owner[entries.long().ravel()] = number
        start = 0
        for name, value in numbered.items():
            of_entry = owner[start : start + value.numel()].reshape(value.shape)
            start += value.numel()
            used, of_entry = of_entry.unique(return_inverse=True)
            origins[name] = ([pieces[number][0] for number in used], of_entry)
        return origins

    def deltas(self, merged: set[str]) -> dict[str, Arrays]:
        """Returns random changes by expert: `saved` is a checkpoint's, `module` the module's.

        Args:
            merged: The names of the checkpoint's tensors that are merged.
        """
        generator = torch.Generator().manual_seed(0)
        # Statistics of batch normalisation have no gradient in PyTorch, and no changes here.
        trained = {name for name, _ in self.model.named_parameters()}
        self._deltas: list[Inputs] = []
        in_checkpoint = []
        for _ in range(EXPERTS):
            change = {
                name: (NOISE * torch.randn(value.shape, generator=generator)).to(value.dtype)
                if name in trained
                else torch.zeros_like(value)
                for name, value in self._parameters.items()
                if merged.issuperset(self._origins[name][0])
            }
            self._deltas.append({n: value for n, value in change.items() if n in trained})
            in_checkpoint.append(revert_weight_conversion(self.model, dict(change)))
        return {
            name: np.stack([change[name].numpy() for change in in_checkpoint])
            for name in in_checkpoint[0]
        }

    def _run(self, coefficients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        merged = dict(self._parameters)
        for name in self._deltas[0]:
            tensors, owner = self._origins[name]
            for expert, change in enumerate(self._deltas):
                by_tensor = torch.stack([coefficients[tensor][expert] for tensor in tensors])
                scale = by_tensor[0] if owner is None else by_tensor[owner]
                merged[name] = merged[name] + scale * change[name]
        result = functional_call(self.model, merged, kwargs=self.inputs)
        return output_of(result, self.index)

    def learn(self, deltas: Arrays) -> tuple[Arrays, float, np.ndarray]:
        """Returns the coefficients by tensor, the epsilon and the first expert's output."""
        with torch.no_grad():
            target = self._run({name: torch.tensor([1.0, 0.0]) for name in deltas})
        coefficients = {
            name: torch.full((EXPERTS,), START, dtype=target.dtype, requires_grad=True)
            for name in deltas
        }
        optimizer = None
        for _ in range(STEPS):
            loss = (self._run(coefficients) - target).square().mean()
            gradients = torch.autograd.grad(
                loss, list(coefficients.values()), allow_unused=True, materialize_grads=True
            )
            if optimizer is None:
                largest = max(float(gradient.abs().max()) for gradient in gradients)
                if not 0 < largest < np.inf:
                    raise NotLearnedError(f"PyTorch's largest gradient is {largest}")
                epsilon = 1e-3 * largest
                optimizer = torch.optim.Adam(coefficients.values(), lr=RATE, eps=epsilon)
            for leaf, gradient in zip(coefficients.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
        learned = {name: leaf.detach().numpy() for name, leaf in coefficients.items()}
        return learned, epsilon, target.numpy()


def output_of(result: Any, index: int | None) -> torch.Tensor:
    """Returns the output to compare from what a forward returns."""
    if index is None:
        return result.logits
    return _leaves(result)[index]


def _index_of_output(result: Any, again: Any) -> int | None:
    """Returns the place of the first output with a gradient that two runs have in common.

    Raises:
        NotLearnedError: There is none.
    """
    has_logits = isinstance(getattr(result, "logits", None), torch.Tensor)
    indices = [None] if has_logits else range(len(_leaves(result)))
    with_gradient = [
        index
        for index in indices
        for leaf in (output_of(result, index),)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.numel() > 1
    ]
    for index in with_gradient:
        first, second = output_of(result, index).detach(), output_of(again, index).detach()
        is_same = first.shape == second.shape
        if is_same and torch.allclose(first, second, atol=1e-5, equal_nan=True):
            return index
    if with_gradient:
        raise NotLearnedError("its forward draws random numbers")
    raise NotLearnedError("nothing that its forward returns has a gradient")


def _leaves(result: Any) -> list[Any]:
    return _pytree.tree_leaves(result.to_tuple() if hasattr(result, "to_tuple") else result)


def _in_jax(model: PreTrainedModel, inputs: Inputs) -> tuple[Reference, InJax, str | None]:
    """Returns the model as PyTorch and as JAX run it, and the reason for which recipes refuse it.

    A model that recipes learn from texts alone gets no images. A model that they refuse is run
    whole.
    """
    refusal = None
    architecture = type(model).__name__
    if is_known(model.config) or kind_of(model.config, architecture) is not None:
        try:
            family = family_of(model.config, architecture)
            given = texts_of(model) if family.blind is not None else inputs
            reference = Reference(model, given)
            return reference, _by_family(family, model, given, reference), None
        except (InputError, NotLearnedError) as error:
            refusal = " ".join(str(error).split())
    reference = Reference(model, inputs)
    try:
        return reference, _whole(model, inputs, reference), refusal
    except Exception as error:
        raise error if refusal is None else NotLearnedError(refusal) from error


def _whole(model: PreTrainedModel, inputs: Inputs, reference: Reference) -> InJax:
    """Returns a model whose whole forward is run by the bridge."""
    runnable = copy.deepcopy(model)
    runnable.set_experts_implementation("batched_mm")
    bridged = TorchModel(runnable, "nothing")
    shapes = {name: leaf.shape for name, leaf in bridged.weights.shapes.items()}

    def forward(parameters: Any, head_tensors: Arrays, inputs: Any) -> jax.Array:
        result = bridged.call(parameters, runnable.forward, {**inputs, **sizes})
        return output_of(result, reference.index).jax()

    sizes = {name: value for name, value in inputs.items() if name in SIZES}
    arrays = _pytree.tree_map(
        _array, {name: value for name, value in inputs.items() if name not in SIZES}
    )
    dtype = next(model.parameters()).numpy(force=True).dtype
    tensors = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    jax.eval_shape(forward, tensors, {}, arrays)
    return InJax("whole", shapes, forward, {}, arrays)


def _array(value: torch.Tensor) -> np.ndarray:
    """Returns an input as an array; JAX has integers of 32 bits."""
    return value.numpy().astype(np.int32) if value.dtype == torch.long else value.numpy()


def _by_family(
    family: Family, model: PreTrainedModel, inputs: Inputs, reference: Reference
) -> InJax:
    config = model.config
    backbone, head = family.build_backbone(config), family.build_head(config)
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    if family.images is not None and "pixel_values" in inputs:
        arrays = _with_images(family, inputs)
    else:
        lacking = [
            name
            for name, value in inputs.items()
            if name not in family.inputs and not torch.equal(value, torch.ones_like(value))
        ]
        if lacking:
            raise NotLearnedError(f"recipes give it no {', '.join(lacking)}")
        arrays = {name: _array(value) for name, value in inputs.items() if name in family.inputs}
    saved = reference.saved
    head_tensors = {
        name: saved[name] for name in head.shapes if name in saved and name not in shapes
    }

    def forward(parameters: Any, head_tensors: Arrays, inputs: Any) -> jax.Array:
        outputs = backbone(parameters, inputs)
        if family.auto_class is None:
            return outputs.pooled
        return head(complete_head(head, head_tensors, parameters), outputs)

    return InJax("bridge" if family.bridged else "own", shapes, forward, head_tensors, arrays)


def _with_images(family: Family, inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns a batch with an image a text, see `adamerge_jax/models/images_in_text.py`."""
    rows = len(inputs["input_ids"])
    pixels, grid = inputs["pixel_values"].numpy(), None
    sizes = {}
    if "image_position_ids" in inputs:
        columns, height = (inputs["image_position_ids"][0].max(0).values + 1).tolist()
        pixels = pixels.reshape(rows, 1, 1, height, columns, -1)
    elif "image_sizes" in inputs and pixels.ndim == 5 and pixels.shape[1] > 1:
        pixels = pixels[:, None]
        sizes[SIZES_OF_IMAGES] = np.zeros((rows, 0, *inputs["image_sizes"][0].tolist()), np.float32)
    elif "image_grid_thw" in inputs:
        grid = tuple(inputs["image_grid_thw"][0].tolist())
        pixels = pixels.reshape(rows, 1, *grid, -1)
    else:
        pixels = pixels.reshape(rows, 1, *pixels.shape[-3:])
    batch = {
        name: inputs[name].numpy().astype(np.int32) for name in ("input_ids", "attention_mask")
    }
    positions = [family.images.positions(row.tolist(), grid) for row in batch["input_ids"]]
    if positions[0] is not None:
        batch["position_ids"] = np.stack(positions)
    return {**batch, PIXELS: pixels, COUNT: np.ones(rows, np.int32), **sizes}


def _learn_in_jax(
    in_jax: InJax, saved: Arrays, deltas: Arrays, target: np.ndarray, epsilon: float
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the coefficients by parameter, `[L, K]`, and the seconds of a core of compilation."""
    shapes = in_jax.shapes
    base, changes = {}, {}
    for name, shape in shapes.items():
        tensors = tensors_of(name, shape)
        is_stack = tensors != [name]
        base[name] = np.stack([saved[t] for t in tensors]) if is_stack else saved[name]
        change = np.stack([deltas[t] for t in tensors]) if is_stack else deltas[name]
        changes[name] = DenseDelta(jnp.asarray(change))
    granularity = tensor(shapes)
    optimizer = optax.adam(RATE, eps=epsilon)
    values = granularity.init(constant(shapes, EXPERTS, START))
    values = {name: value.astype(target.dtype) for name, value in values.items()}
    mixed = mix if target.dtype == np.float32 else _mixed
    torch_in_jax()

    def step(values: Any, state: Any, base: Any, changes: Any, rest: Any) -> Any:
        def loss(values: Any) -> jax.Array:
            parameters = mixed(base, changes, granularity.scales(values))
            output = in_jax.forward(parameters, rest["head_tensors"], rest["inputs"])
            return jnp.square(output - rest["target"]).mean()

        updates, state = optimizer.update(jax.grad(loss)(values), state)
        return optax.apply_updates(values, updates), state

    rest = {"head_tensors": in_jax.head_tensors, "inputs": dict(in_jax.inputs), "target": target}
    arguments = jax.device_put((base, changes, rest))
    state = optimizer.init(values)
    start = time.process_time()
    compiled = jax.jit(step).lower(values, state, *arguments).compile()
    seconds = time.process_time() - start
    for _ in range(STEPS):
        values, state = compiled(values, state, *arguments)
    return {name: np.asarray(value) for name, value in values.items()}, seconds


def _mixed(base: Any, changes: Any, scales: Any) -> dict[str, jax.Array]:
    """Returns merged parameters in the base's dtype; those of the package are sums in float32."""
    return {
        name: value + (scales[name] * changes[name].values).sum(int(is_stacked(name)))
        for name, value in base.items()
    }
