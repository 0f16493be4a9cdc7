"""From checkpoints to parameters and task vectors, one tensor at a time, and back again.

Peak host memory is what is returned plus one tensor of one expert: no expert is ever loaded whole.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array
from transformers import AutoTokenizer, PretrainedConfig

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, match, require_same_architecture
from adamerge_jax.coefficients import Coefficients, Source
from adamerge_jax.errors import InputError
from adamerge_jax.granularities import Shapes
from adamerge_jax.interference import FittedStep, apply_steps, fit_steps
from adamerge_jax.mixing import Mixture
from adamerge_jax.models import Family, family_of
from adamerge_jax.names import is_stacked, matches, tensor_shape, tensors_of
from adamerge_jax.recipes import ModelSource, Recipe
from adamerge_jax.task_vectors import DenseDelta
from adamerge_jax.zero_shot import text_network, zero_shot_head

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtypes by their names in a recipe."""

# XLA's CPU backend takes over host memory without a copy where it is aligned to this.
_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Models:
    """A base model and its experts, opened and matched by name; no weight has been read.

    Attributes:
        family: The architecture family of all of them.
        shapes: Shape of every parameter of the trunk, `(L, *shape)` where stacked.
        base: The base's checkpoint.
        experts: The experts' checkpoints by task.
        sources: Where they come from, for the coefficients file: the base, then the experts.
        kept: Names without `*` of the trunk's parameters that are not merged but stay the base's.
    """

    family: Family
    shapes: Shapes
    base: MatchedCheckpoint
    experts: Mapping[str, MatchedCheckpoint]
    sources: tuple[Source, ...]
    kept: frozenset[str]

    @property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return self.base.checkpoint.config

    @property
    def prefix(self) -> str:
        """What the base's own tensors lack in front of the names that they have here.

        A base saved without a head has `encoder.layer...` for `bert.encoder.layer...`; the merged
        checkpoint has the experts' names, which every task's model shares.
        """
        name, in_file = next(iter(self.base.names.items()))
        return name.removesuffix(in_file) if name.endswith(in_file) else ""

    def tensors(self, name: str) -> list[str]:
        """The checkpoint tensors that a parameter of the trunk consists of."""
        return tensors_of(name, self.shapes[name])

    def head_names(self, task: str) -> list[str]:
        """Names of the parameters that a task's checkpoint has for its head."""
        return [name for name in self.experts[task].names if name not in self.base.names]


def open_models(recipe: Recipe, root: Path) -> Models:
    """Opens and checks the base and all experts of a recipe.

    Args:
        recipe: Says which.
        root: Folder that relative paths start from.

    Raises:
        InputError: A checkpoint is missing, damaged or of another architecture, or a pattern in
            `keep_from_base` fits no parameter.
    """
    base = _open(recipe.base, root, "base")
    family = family_of(base.config)
    shapes = {name: leaf.shape for name, leaf in family.build_trunk(base.config).shapes.items()}
    trunk = _unstacked_shapes(shapes)
    for pattern in recipe.keep_from_base:
        if not any(matches(name, [pattern]) for name in trunk):
            raise InputError(
                f"keep_from_base: {pattern!r} fits no parameter; "
                f"parameters are called e.g. {next(iter(trunk))!r}"
            )
    base_match = _match_trunk(family, trunk, base, "base")
    experts = {}
    for task, task_recipe in recipe.tasks.items():
        role = f"expert {task!r}"
        expert = _open(task_recipe.expert, root, role)
        require_same_architecture(base, expert, role=role)
        head = {}
        if family.auto_class is not None:
            head = family.build_head(expert.config).shapes
        experts[task] = match(
            expert,
            trunk | {name: leaf.shape for name, leaf in head.items()},
            role=role,
            prefixes=family.prefixes,
            optional=family.base_only,
            ignored=(*family.ignored(base.config), *family.ignored_in_experts),
        )
    kept = {
        name
        for name in trunk
        if matches(name, recipe.keep_from_base)
        or any(name not in expert.names for expert in experts.values())
    }
    said = {"base": recipe.base} | {task: t.expert for task, t in recipe.tasks.items()}
    checkpoints = {"base": base} | {task: expert.checkpoint for task, expert in experts.items()}
    sources = tuple(
        Source(name, said[name].path, said[name].revision, checkpoint.identity())
        for name, checkpoint in checkpoints.items()
    )
    return Models(family, shapes, base_match, experts, sources, frozenset(kept))


def match_trunk(models: Models, checkpoint: Checkpoint, role: str) -> MatchedCheckpoint:
    """Finds the trunk's parameters in another checkpoint of the same architecture.

    Raises:
        InputError: One is missing or has another shape.
    """
    return _match_trunk(models.family, _unstacked_shapes(models.shapes), checkpoint, role)


def load_trunk(
    models: Models, checkpoint: MatchedCheckpoint, dtype: np.dtype | None
) -> dict[str, Array]:
    """Reads the trunk of the base or of one expert; what an expert lacks is the base's.

    Args:
        models: The base and its experts.
        checkpoint: The one to read.
        dtype: Of the arrays; by default each tensor's in the base.

    Returns:
        Arrays by name, `[L, *shape]` where stacked.
    """
    parameters = {}
    for name, shape in models.shapes.items():
        tensors = models.tensors(name)
        array = _aligned_empty(shape, dtype or models.base.dtype(tensors[0]))
        for row, tensor in zip(array if is_stacked(name) else [array], tensors, strict=True):
            source = checkpoint if tensor in checkpoint.names else models.base
            row[...] = source.read(tensor)
        parameters[name] = jax.device_put(array, may_alias=True)
    return parameters


def load_zero_shot_head(
    models: Models, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Array]:
    """Makes a task's head with the base's own text tower and tokenizer.

    Args:
        models: A whole CLIP as the base, and its experts.
        class_names: C names, in the order of the task's labels.
        templates: Sentences with a `{}` for the name.

    Returns:
        Parameters of the head, float32.
    """
    shapes = {name: leaf.shape for name, leaf in text_network(models.config).shapes.items()}
    tower = match(models.base.checkpoint, _unstacked_shapes(shapes), role="base", allow_extra=True)
    parameters = {
        name: np.stack([tower.read(tensor) for tensor in tensors_of(name, shape)])
        if is_stacked(name)
        else tower.read(name)
        for name, shape in shapes.items()
    }
    wide = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
    tokenizer = AutoTokenizer.from_pretrained(models.base.checkpoint.folder)
    return zero_shot_head(models.config, wide, tokenizer, class_names, templates)


def load_task_vectors(
    models: Models, dtype: np.dtype | None, interference: Sequence[FittedStep] = ()
) -> tuple[dict[str, DenseDelta], list[str], tuple[FittedStep, ...]]:
    """Reads what every expert changed in the base.

    Args:
        models: The base and its experts.
        dtype: Of the deltas; by default each tensor's in the base.
        interference: What is done to the task vectors.

    Returns:
        Deltas by name, `[K, *shape]`, or `[L, K, *shape]` where stacked; the names without `*` of
        the tensors that are mixed; and the interference steps with what they learned. Parameters
        that no expert changed are in neither.
    """
    read, mixed = {}, {}
    for name, shape in models.shapes.items():
        tensors = models.tensors(name)
        layers = (shape[0],) if is_stacked(name) else ()
        values = _aligned_empty(
            (*layers, len(models.experts), *shape[len(layers) :]),
            dtype or models.base.dtype(tensors[0]),
        )
        rows = values if layers else [values]
        changed = {
            tensor: row
            for row, tensor in zip(rows, tensors, strict=True)
            if _fill_delta(models, tensor, row)
        }
        if changed:
            read[name] = values
            mixed |= changed
    fitted = fit_steps(interference, mixed)
    deltas = {
        name: DenseDelta(jax.device_put(values, may_alias=True)) for name, values in read.items()
    }
    return deltas, list(mixed), fitted


def load_head(models: Models, task: str) -> dict[str, np.ndarray]:
    """Reads a task's own head, in the dtype that it is stored in."""
    return {name: models.experts[task].read(name) for name in models.head_names(task)}


def fold(models: Models, coefficients: Coefficients) -> Iterator[tuple[str, np.ndarray]]:
    """The merged trunk, tensor by tensor, in the order and the dtype of the base.

    Reads the checkpoints again rather than the task vectors in memory: sums are those of the
    stored weights whatever the representation while learning, and memory stays at one tensor of
    every expert.

    Yields:
        The name of a tensor (without `*`) and its merged value.

    Raises:
        InputError: The coefficients mix a parameter that these models do not have.
    """
    shapes = {
        name: models.base.shape(name)
        for name in coefficients.parameters
        if name in models.base.names
    }
    if missing := [name for name in coefficients.parameters if name not in shapes]:
        raise InputError(
            f"the coefficients mix {missing[0]}, which the base ({models.base.checkpoint.source}) "
            "does not have; fold them with the recipe that they were learned with"
        )
    granularity = coefficients.make_granularity(shapes)
    scales = granularity.scales(coefficients.stacked_once())
    for name in models.base.names:
        tensor = models.base.read(name)
        if name in scales:
            values = np.empty((len(models.experts), *tensor.shape), np.float32)
            _fill_delta(models, name, values)
            values = apply_steps(coefficients.interference, name, values)
            delta = granularity.prepare(name, DenseDelta(values))
            mixture = Mixture(tensor.astype(np.float32), delta, scales[name])
            tensor = np.asarray(_materialize(mixture)).astype(tensor.dtype)
        yield name, tensor


def resolve(path: str, root: Path) -> str:
    """A path of a recipe against its root; what is not there stays as written: a Hub id."""
    local = root / Path(path).expanduser()
    return str(local) if local.exists() else path


_materialize = jax.jit(Mixture.materialize)


def _fill_delta(models: Models, tensor: str, out: np.ndarray) -> bool:
    """Writes `tau_k` of all experts into `out`, `[K, *shape]`; whether any differs from 0."""
    if tensor in models.kept:
        out[...] = 0
        return False
    base = models.base.read(tensor).astype(np.float32)
    changed = False
    for row, expert in zip(out, models.experts.values(), strict=True):
        difference = expert.read(tensor).astype(np.float32) - base
        changed |= bool(difference.any())
        row[...] = difference
    return changed


def _match_trunk(
    family: Family, trunk: Shapes, checkpoint: Checkpoint, role: str
) -> MatchedCheckpoint:
    return match(
        checkpoint,
        trunk,
        role=role,
        prefixes=family.prefixes,
        ignored=family.ignored(checkpoint.config),
        allow_extra=True,
    )


def _unstacked_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of checkpoint tensors, from those of (stacked) parameters."""
    return {
        tensor: tensor_shape(name, shape)
        for name, shape in shapes.items()
        for tensor in tensors_of(name, shape)
    }


def _open(source: ModelSource, root: Path, role: str) -> Checkpoint:
    try:
        return Checkpoint.open(resolve(source.path, root), revision=source.revision)
    except InputError as error:
        raise InputError(f"{role}: {error} (relative paths start at {root})") from error


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that `jax.device_put` need not copy on CPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)
