"""From checkpoints to parameters and task vectors, one tensor at a time, and back again.

Peak host memory is what is returned plus one tensor of one expert: no expert is ever loaded whole.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array
from transformers import AutoTokenizer, PretrainedConfig

from adamerge_jax.checkpoints.huggingface import Checkpoint, locate
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, match, require_same_architecture
from adamerge_jax.checkpoints.peft import MatchedAdapter, is_adapter, open_adapter
from adamerge_jax.coefficients import Coefficients, Source
from adamerge_jax.errors import InputError
from adamerge_jax.granularities import Shapes, constant, make_granularity
from adamerge_jax.interference import FittedStep, apply_steps, fit_steps
from adamerge_jax.mixing import Mixture, mix
from adamerge_jax.models import Family, family_of
from adamerge_jax.names import is_stacked, matches, tensor_shape, tensors_of
from adamerge_jax.recipes import ModelSource, Recipe
from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LoadedDelta, LowRankDelta
from adamerge_jax.zero_shot import text_network, zero_shot_head

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtypes by their names in a recipe."""

FLOAT32 = DTYPES["float32"]

Expert = MatchedCheckpoint | MatchedAdapter
"""A whole fine-tuned model, or an adapter."""

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
        sources: Where they come from, for the coefficients file: the base, then the experts. Empty
            where no weight was to be read.
        kept: Names without `*` of the trunk's parameters that are not merged but stay the base's.
    """

    family: Family
    shapes: Shapes
    base: MatchedCheckpoint
    experts: Mapping[str, Expert]
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


def open_models(recipe: Recipe, root: Path, *, read_weights: bool = True) -> Models:
    """Opens and checks the base and all experts of a recipe.

    Args:
        recipe: Says which.
        root: Folder that relative paths start from.
        read_weights: Whether to look into the weights: for their fingerprints, and for what an
            adapter does to tied embeddings. Otherwise only configs and headers are read.

    Raises:
        InputError: A checkpoint is missing, damaged or of another architecture, or a pattern in
            `keep_from_base` fits no parameter.
    """
    with _explained("base", root):
        base = Checkpoint.open(resolve(recipe.base.path, root), revision=recipe.base.revision)
    family = family_of(base.config)
    shapes = {name: leaf.shape for name, leaf in family.build_trunk(base.config).shapes.items()}
    trunk = _unstacked_shapes(shapes)
    for pattern in recipe.own_keep_from_base:
        if not any(matches(name, [pattern]) for name in trunk):
            raise InputError(
                f"keep_from_base: {pattern!r} fits no parameter; "
                f"parameters are called e.g. {next(iter(trunk))!r}"
            )
    base_match = _match_trunk(family, trunk, base, "base")
    experts = {
        task: _open_expert(
            family,
            trunk,
            base_match,
            task_recipe.expert,
            root,
            role=f"expert {task!r}",
            read_weights=read_weights,
        )
        for task, task_recipe in recipe.tasks.items()
    }
    kept = {
        name
        for name in trunk
        if matches(name, recipe.keep_from_base)
        or any(name not in expert.names for expert in experts.values())
    }
    if not read_weights:
        return Models(family, shapes, base_match, experts, (), frozenset(kept))
    said = {"base": recipe.base} | {task: t.expert for task, t in recipe.tasks.items()}
    sources = tuple(
        Source(name, said[name].path, said[name].revision, model.identity())
        for name, model in {"base": base, **experts}.items()
    )
    return Models(family, shapes, base_match, experts, sources, frozenset(kept))


def match_trunk(models: Models, checkpoint: Checkpoint, role: str) -> MatchedCheckpoint:
    """Finds the trunk's parameters in another checkpoint of the same architecture.

    Raises:
        InputError: One is missing or has another shape.
    """
    return _match_trunk(models.family, _unstacked_shapes(models.shapes), checkpoint, role)


def load_expert(
    models: Models, task: str, base: Mapping[str, Array], dtype: np.dtype | None
) -> dict[str, Array | Mixture]:
    """The trunk of one expert: its own arrays, or for an adapter the base's with lazy factors.

    Args:
        models: The base and its experts.
        task: Whose expert.
        base: The base's trunk.
        dtype: Of the arrays; by default each tensor's in the base.
    """
    expert = models.experts[task]
    if isinstance(expert, MatchedCheckpoint):
        return load_trunk(models, expert, dtype)
    alone = dataclasses.replace(models, experts={task: expert}, kept=frozenset())
    deltas, _, _ = load_task_vectors(alone, dtype)
    shapes = {name: models.shapes[name] for name in deltas}
    whole = make_granularity("tensor", {}, shapes)
    return mix(base, deltas, whole.scales(whole.init(constant(shapes, 1, 1.0))))


def load_trunk(models: Models, checkpoint: Expert, dtype: np.dtype | None) -> dict[str, Array]:
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
) -> tuple[dict[str, LoadedDelta], list[str], tuple[FittedStep, ...]]:
    """Reads what every expert changed in the base.

    Adapters stay factors, unless interference steps ask for entries.

    Args:
        models: The base and its experts.
        dtype: Of the deltas; by default each tensor's in the base, float32 for factors.
        interference: What is done to the task vectors.

    Returns:
        Deltas by name, stacked where the name is; the names without `*` of the tensors that are
        mixed; and the interference steps with what they learned. Parameters that no expert
        changed are in neither.
    """
    if not interference:
        read, mixed = {}, []
        for name in models.shapes:
            delta, changed = _read_delta(models, name, models.tensors(name), dtype)
            if changed:
                read[name] = delta
                mixed += changed
        return read, mixed, ()
    read, entries = {}, {}
    for name in models.shapes:
        values, changed = _read_entries(models, name, models.tensors(name), dtype)
        if changed:
            read[name] = values
            rows = values if is_stacked(name) else [values]
            by_tensor = zip(models.tensors(name), rows, strict=True)
            entries |= {tensor: row for tensor, row in by_tensor if tensor in changed}
    fitted = fit_steps(interference, entries)
    deltas = {
        name: DenseDelta(jax.device_put(values, may_alias=True)) for name, values in read.items()
    }
    return deltas, list(entries), fitted


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
            if coefficients.interference:
                values, _ = _read_entries(models, name, [name], FLOAT32)
                delta = DenseDelta(apply_steps(coefficients.interference, name, values))
            else:
                delta, _ = _read_delta(models, name, [name], FLOAT32)
            delta = granularity.prepare(name, delta)
            mixture = Mixture(tensor.astype(np.float32), delta, scales[name])
            tensor = np.asarray(_materialize(mixture)).astype(tensor.dtype)
        yield name, tensor


def resolve(path: str, root: Path) -> str:
    """A path of a recipe against its root; what is not there stays as written: a Hub id."""
    local = root / Path(path).expanduser()
    return str(local) if local.exists() else path


_materialize = jax.jit(Mixture.materialize)


def _read_delta(
    models: Models, name: str, tensors: Sequence[str], dtype: np.dtype | None
) -> tuple[LoadedDelta | None, list[str]]:
    """The deltas of all experts for one parameter, and which of its tensors they change.

    None where no adapter touches it: of a table that only the base has, not a row is read.

    Args:
        models: The base and its experts.
        name: Of the parameter; stacked if `tensors` are L.
        tensors: Those that it consists of.
        dtype: Of the deltas; by default that of the base, float32 for factors.
    """
    experts = list(models.experts.values())
    open_tensors = [tensor for tensor in tensors if tensor not in models.kept]
    low_rank = [
        position
        for position, expert in enumerate(experts)
        if any(expert.has_factors(tensor) for tensor in open_tensors)
    ]
    if not any(expert.changes(tensor) for expert in experts for tensor in open_tensors):
        return None, []
    if not low_rank:
        values, changed = _read_entries(models, name, tensors, dtype)
        return DenseDelta(jax.device_put(values, may_alias=True)), changed
    parts: list[tuple[LoadedDelta, tuple[int, ...]]] = []
    factors, changed = _read_factors(models, name, tensors, [experts[k] for k in low_rank], dtype)
    parts.append((factors, tuple(low_rank)))
    # An adapter may have factors in one layer of a stack and another layer whole: it is in both.
    whole = [
        position
        for position, expert in enumerate(experts)
        if any(expert.changes(each) and not expert.has_factors(each) for each in open_tensors)
    ]
    if whole:
        values, also = _read_entries(
            models, name, tensors, dtype, [experts[k] for k in whole], factors=False
        )
        if also:
            parts.append((DenseDelta(jax.device_put(values, may_alias=True)), tuple(whole)))
            changed = [tensor for tensor in tensors if tensor in {*changed, *also}]
    if len(parts) == 1 and len(low_rank) == len(experts):
        return factors, changed
    deltas, positions = zip(*parts, strict=True)
    return JoinedDelta(deltas, positions, len(experts)), changed


def _read_entries(
    models: Models,
    name: str,
    tensors: Sequence[str],
    dtype: np.dtype | None,
    experts: Sequence[Expert] | None = None,
    *,
    factors: bool = True,
) -> tuple[np.ndarray, list[str]]:
    """Deltas entry by entry, `[K, *shape]` or `[L, K, *shape]`, and the tensors they change.

    Those that are stored as factors are multiplied out; without `factors`, they stay 0.
    """
    experts = list(models.experts.values()) if experts is None else experts
    layers = (len(tensors),) if is_stacked(name) else ()
    shape = (*layers, len(experts), *models.base.shape(tensors[0]))
    values = _aligned_empty(shape, dtype or models.base.dtype(tensors[0]))
    rows = values if layers else [values]
    changed = [
        tensor
        for tensor, row in zip(tensors, rows, strict=True)
        if _fill_entries(models, tensor, experts, row, factors)
    ]
    return values, changed


def _fill_entries(
    models: Models, tensor: str, experts: Sequence[Expert], out: np.ndarray, with_factors: bool
) -> bool:
    """Writes `tau_k` of some experts into `out`, `[K, *shape]`; whether any differs from 0."""
    out[...] = 0
    if tensor in models.kept:
        return False
    base = models.base.read(tensor).astype(np.float32)
    changed = False
    for row, expert in zip(out, experts, strict=True):
        if not expert.changes(tensor) or (expert.has_factors(tensor) and not with_factors):
            continue
        factors = expert.low_rank(tensor)
        if factors is None:
            difference = expert.read(tensor).astype(np.float32) - base
        else:
            difference = factors.left @ factors.right
        changed |= bool(difference.any())
        row[...] = difference
    return changed


def _read_factors(
    models: Models,
    name: str,
    tensors: Sequence[str],
    experts: Sequence[Expert],
    dtype: np.dtype | None,
) -> tuple[LowRankDelta, list[str]]:
    """Deltas as factors of the largest rank among experts and layers; zeros beyond their own."""
    found = {
        (layer, position): factors
        for layer, tensor in enumerate(tensors)
        if tensor not in models.kept
        for position, expert in enumerate(experts)
        if (factors := expert.low_rank(tensor)) is not None
    }
    rank = max(factors.right.shape[0] for factors in found.values())
    height, width = models.base.shape(tensors[0])
    left = np.zeros((len(tensors), len(experts), height, rank), dtype or np.float32)
    right = np.zeros((len(tensors), len(experts), rank, width), dtype or np.float32)
    for (layer, position), factors in found.items():
        own = factors.right.shape[0]
        left[layer, position, :, :own] = factors.left
        right[layer, position, :own] = factors.right
    if not is_stacked(name):
        left, right = left[0], right[0]
    # The B that PEFT starts with is 0, and stays so where nothing was trained.
    layers = {layer for (layer, _), own in found.items() if own.left.any() and own.right.any()}
    changed = [tensors[layer] for layer in sorted(layers)]
    return LowRankDelta(jnp.asarray(left), jnp.asarray(right)), changed


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


def _open_expert(
    family: Family,
    trunk: Shapes,
    base: MatchedCheckpoint,
    source: ModelSource,
    root: Path,
    *,
    role: str,
    read_weights: bool,
) -> Expert:
    """Opens a whole fine-tuned model or a LoRA adapter."""

    def head(config: PretrainedConfig) -> Shapes:
        if family.auto_class is None or family.language:
            return {}
        return {name: leaf.shape for name, leaf in family.build_head(config).shapes.items()}

    path = resolve(source.path, root)
    with _explained(role, root):
        folder = locate(path, revision=source.revision)
    if is_adapter(folder):
        adapter = open_adapter(
            source.path,
            folder,
            base,
            role=role,
            head=head,
            prefixes=family.prefixes,
            ignored=family.ignored(base.checkpoint.config),
            unused=family.ignored_in_experts,
            renamed=family.renamed,
            tied=family.tied(base.checkpoint.config) if read_weights else (),
        )
        missing = [name for name in head(adapter.checkpoint.config) if name not in adapter.names]
        if missing:
            raise InputError(
                f"{role} ({source.path}) lacks {missing[0]}: an adapter for classification must "
                "bring its head; train it with modules_to_save"
            )
        return adapter
    with _explained(role, root):
        expert = Checkpoint.in_folder(path, folder)
    require_same_architecture(base.checkpoint, expert, role=role)
    return match(
        expert,
        trunk | head(expert.config),
        role=role,
        prefixes=family.prefixes,
        optional=family.base_only,
        ignored=(*family.ignored(expert.config), *family.ignored_in_experts),
    )


@contextmanager
def _explained(role: str, root: Path) -> Iterator[None]:
    """Says in error messages what cannot be opened, and where relative paths start."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{role}: {error} (relative paths start at {root})") from error


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that `jax.device_put` need not copy on CPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)
