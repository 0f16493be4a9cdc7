"""Reading PEFT adapters: LoRA factors, and the parameters saved whole beside them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.finite import LARGEST, require_finite
from adamerge_jax.checkpoints.huggingface import INDEX_FILE, Checkpoint
from adamerge_jax.checkpoints.huggingface import WEIGHTS_FILE as MODEL_FILE
from adamerge_jax.checkpoints.matching import (
    PARAMETER_DTYPES,
    MatchedCheckpoint,
    find_names,
    require_filled,
)
from adamerge_jax.checkpoints.peft_config import (
    CONFIG_FILE,
    MERGE_IT,
    WEIGHTS_FILE,
    read_adapter_config,
    scalings,
)
from adamerge_jax.checkpoints.renamed import renamed as names_of_other_versions
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, read_header
from adamerge_jax.checkpoints.wrappers import without_marks
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "base_model.model."
"""The prefix that PEFT gives to the names of the wrapped model."""

_FACTORS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
"""The endings of the names of the two factors."""

LINEAR_ENDINGS, EMBEDDING_ENDINGS = _FACTORS.items()

_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""The endings of the name of DoRA's vector of magnitudes."""

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""The types of models whose linear layers have weights `[inputs, outputs]`."""

_OUTPUT_LAYERS = ("lm_head", "score")
"""The linear layers of such models whose weights are not transposed."""

_DEFAULT_ADAPTER = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B))\.default(\.weight)?$")

_OTHER = _FACTORS | {b: a for a, b in _FACTORS.items()}
"""The ending of the other factor."""


Form = Literal["linear", "embedding", "transposed"]
"""The kinds of modules. An embedding table and a transposed linear layer have the product of the
factors transposed."""


class Factors(NamedTuple):
    """A task vector of one matrix as a product, `left @ right`.

    Attributes:
        left: `[m, r]`, the scaled B; the scaled A transposed where the module has it so.
        right: `[r, n]`.
        form: The kind of module that it is a matrix of.
    """

    left: Float[np.ndarray, "m r"]
    right: Float[np.ndarray, "r n"]
    form: Form


class _FactorNames(NamedTuple):
    """The tensors of a module's factors.

    Attributes:
        a: The name of A in the file.
        b: The name of B.
        scaling: The scaling of their product.
        form: The kind of module.
        magnitude: The name of DoRA's vector; None without one.
    """

    a: str
    b: str
    scaling: float
    form: Form
    magnitude: str | None = None


@dataclass(frozen=True, eq=False)
class MatchedAdapter:
    """A LoRA adapter whose tensors have the names of the parameters that they change.

    It is read like a `MatchedCheckpoint` of the model that it makes of the base.

    Attributes:
        checkpoint: The adapter's files, with the config of the model it makes.
        role: Its role in the merge, for messages: `expert 'trec'`.
        base: The model that it changes.
        factors: The names of the two factors in the file, and their scaling, by parameter.
        saved: The name in the file of every parameter that was saved whole.
        trained_on: The base's folder or Hub name as the adapter's config has it, if it does.
        of_base: The name in the base's file of every parameter of its head that it left as it is
            there: a ModernBERT's `head.dense` below the classifier that it trained.
        left_out: The tokens of its tokenizer that the merge has no rows for.
        resized: The embedding tables and output layers whose factors have other rows than the
            base: rows that they lack are 0, and further ones are left out.
    """

    checkpoint: Checkpoint
    role: str
    base: MatchedCheckpoint
    factors: Mapping[str, _FactorNames] = field(repr=False)
    saved: Mapping[str, str] = field(repr=False)
    trained_on: str | None = None
    of_base: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()
    resized: frozenset[str] = frozenset()

    @property
    def names(self) -> Mapping[str, str]:
        """The parameters of the model that it makes, with their names in one of the files."""
        return {**self.base.names, **self.of_base, **self.saved}

    def identity(self) -> str:
        """Returns a fingerprint of its contents: the tensors and their scalings."""
        by_name = sorted((factors.a, factors.scaling) for factors in self.factors.values())
        return self.checkpoint.identity(json.dumps(by_name))

    def has_factors(self, name: str) -> bool:
        """Returns True if a parameter's task vector is a product of factors."""
        return name in self.factors and self.factors[name].magnitude is None

    def rank(self, name: str) -> int:
        """Returns the rank of a parameter's factors."""
        return self.checkpoint.tensors[self.factors[name].a].shape[0]

    def product_shape(self, name: str) -> tuple[int, int]:
        """Returns the shape of the product of a parameter's factors, as they are in the file."""
        names, tensors = self.factors[name], self.checkpoint.tensors
        a, b = tensors[names.a].shape, tensors[names.b].shape
        return (b[0], a[1]) if names.form == "linear" else (a[1], b[0])

    def low_rank(self, name: str) -> Factors | None:
        """Returns the factors of one parameter's task vector, float32, or None if it has none.

        Raises:
            InputError: They have NaN or infinite values.
        """
        return self._factors(name) if self.has_factors(name) else None

    def _factors(self, name: str) -> Factors:
        """Returns the factors of a parameter's change before DoRA's scaling; see `low_rank`."""
        factors = self.factors[name]
        a, b = (self._read(tensor).astype(np.float32) for tensor in (factors.a, factors.b))
        left, right = (b, a) if factors.form == "linear" else (a.T, np.ascontiguousarray(b.T))
        with np.errstate(over="ignore"):
            left = left * np.float32(factors.scaling)
        if name in self.resized:
            lacking = max(self.base.shape(name)[0] - len(left), 0)
            left = np.pad(left, ((0, lacking), (0, 0)))[: self.base.shape(name)[0]]
        # No entry of the product is larger, nor a part of the sum that makes it.
        rows = np.abs(left.astype(np.float64)) @ np.abs(right).max(1, initial=0).astype(np.float64)
        if not rows.max(initial=0) <= LARGEST:
            raise InputError(
                f"{self.role} ({self.checkpoint.source}): the product of {factors.b}, {factors.a} "
                f"and their scaling {factors.scaling:g} is more than float32 holds; its training "
                "has probably diverged, or its config is another adapter's: leave it out"
            )
        return Factors(left, right, factors.form)

    def read(self, name: str) -> np.ndarray:
        """Returns one parameter of the model that it makes; a changed one is float32.

        Raises:
            InputError: It has NaN or infinite values.
        """
        if name in self.saved:
            return self._read(self.saved[name])
        if name in self.of_base:
            array = self.base.checkpoint.read(self.of_base[name])
            require_finite(
                array, tensor=name, source=self.base.checkpoint.source, role=self.base.role
            )
            return array
        if name not in self.factors:
            return self.base.read(name)
        factors, magnitude = self._factors(name), self.factors[name].magnitude
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            changed = self.base.read(name).astype(np.float32) + factors.left @ factors.right
            if magnitude is not None:  # DoRA (Liu et al., 2024), equation 5
                by_output = changed if factors.form == "linear" else changed.T
                lengths = np.linalg.norm(by_output, axis=1)
                by_output *= (self._read(magnitude).astype(np.float32) / lengths)[:, None]
        require_finite(changed, tensor=name, source=self.checkpoint.source, role=self.role)
        return changed

    def is_untrained(self) -> bool:
        """Returns True if every B is 0, which PEFT starts with, and nothing was saved whole.

        Reads factors up to the first that is not 0.
        """
        trained = (self._read(factors.b).any() for factors in self.factors.values())
        return not any(name in self.base.names for name in self.saved) and not any(trained)

    def changes(self, name: str) -> bool:
        """Returns True if it may differ from the base in a parameter."""
        return name in self.saved or name in self.factors

    def tensor(self, name: str) -> TensorInfo:
        """Returns the tensor in the files of a parameter that it did not change by factors."""
        if name in self.saved:
            return self.checkpoint.tensors[self.saved[name]]
        if name in self.of_base:
            return self.base.checkpoint.tensors[self.of_base[name]]
        return self.base.tensor(name)

    def _read(self, tensor: str) -> np.ndarray:
        array = self.checkpoint.read(tensor)
        require_finite(array, tensor=tensor, source=self.checkpoint.source, role=self.role)
        return array


Expert = MatchedCheckpoint | MatchedAdapter
"""A whole fine-tuned model, or an adapter."""


def is_adapter(folder: Path) -> bool:
    """Returns True if a folder holds an adapter rather than a whole model."""
    # Trainers leave the base's config.json beside an adapter, and an adapter's beside a model.
    whole = any((folder / file).is_file() for file in (MODEL_FILE, INDEX_FILE))
    return (folder / CONFIG_FILE).is_file() and not whole


def open_adapter(
    source: str,
    folder: Path,
    base: MatchedCheckpoint,
    *,
    role: str,
    head: Callable[[PretrainedConfig], Mapping[str, tuple[int, ...]]] | None,
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    unused: Sequence[str] = (),
    renamed: Sequence[tuple[str, str]] = (),
    tied: Sequence[str] = (),
    fit: Callable[[MatchedAdapter], MatchedAdapter] = lambda adapter: adapter,
) -> MatchedAdapter:
    """Opens a LoRA adapter and finds the parameters that it changes.

    Args:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files.
        base: The model that it changes.
        role: Its role in the merge, for messages: `expert 'trec'`.
        head: Shapes of the parameters of a task's head, from a config with the number of classes.
            None where they are not known: a head is then what the adapter's config names in
            `modules_to_save` and the base has not.
        prefixes: Prefixes of parameter names that the adapter may lack.
        ignored: Name patterns of tensors that are no parameters but second names of tied weights.
        unused: Name patterns of tensors that it may have and that are not used: those of modules
            outside the backbone.
        renamed: Pairs of a part of names in a checkpoint and its replacement in adapters.
        tied: Names of the embedding tables that must still be the output layer too; tables that
            were saved whole are read to check it.
        fit: Gives tables of tokens the shapes of the base's, where it can.

    Raises:
        InputError: It is damaged, no LoRA, a kind of LoRA that is not supported, or was not
            trained on this base.
    """
    where = f"{role} ({source})"
    config = read_adapter_config(folder, where)
    tensors = _read_tensors(folder, where)
    of_transposed = base.checkpoint.config.model_type in _TRANSPOSED
    factors, whole = _find_parts(tensors, config, where, renamed, of_transposed=of_transposed)
    second_names = {name: whole.pop(name) for name in list(whole) if matches(name, ignored)}
    if config.get("ensure_weight_tying"):
        factors = {name: pair for name, pair in factors.items() if not matches(name, ignored)}
    of_base = base.checkpoint
    checkpoint = Checkpoint(source, folder, of_base.config, of_base.config_fields, tensors)
    shapes = {name: base.shape(name) for name in base.names}
    names = (*factors, *whole)
    in_adapter = find_names(names, shapes, prefixes)
    # An adapter has the names of the modules it was trained on, a file perhaps those of others.
    placed_names = set(in_adapter.values())
    in_adapter |= names_of_other_versions(
        [name for name in shapes if name not in in_adapter],
        [name for name in names if name not in placed_names],
        of_base.config.model_type,
    )
    placed = {name: factors[alias] for name, alias in in_adapter.items() if alias in factors}
    saved = {name: whole[alias] for name, alias in in_adapter.items() if alias in whole}
    used = set(in_adapter.values())
    unplaced = sorted(n for n in (*factors, *whole) if n not in used and not matches(n, unused))
    if unplaced:
        found = {name: tensors[whole[name]].shape for name in unplaced if name in whole}
        model_config = _with_classes(of_base.config, _classes_of(found))
        checkpoint = dataclasses.replace(checkpoint, config=model_config)
        expected = _modules_to_save(config, found) if head is None else head(model_config)
        if untrained := [name for name in unplaced if name in expected and name in factors]:
            raise InputError(
                f"{where} has factors for {untrained[0]} and not what they are added to, the "
                "head's own weights; train the head with modules_to_save"
            )
        of_head = {name: whole[name] for name in unplaced if name in expected}
        saved |= of_head
        shapes |= expected
        unplaced = [name for name in unplaced if name not in of_head]
    if unplaced:
        raise InputError(
            f"{where} changes {unplaced[0]}{and_more(len(unplaced) - 1)}, which the base "
            f"({base.checkpoint.source}) does not have; an adapter must be trained on the base"
        )
    if not placed and not saved:
        raise InputError(
            f"{where} changes no parameter of the backbone (its tensors have names like "
            f"{min(tensors)}), so that there is nothing to merge; leave it out"
        )
    trained_on = config.get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on.isprintable():
        trained_on = None
    left = {name for name in shapes if name not in base.names and name not in saved}
    adapter = fit(
        MatchedAdapter(
            checkpoint,
            role,
            base,
            placed,
            saved,
            trained_on,
            of_base={
                name: name
                for name in base.extra
                if name in left and of_base.tensors[name].shape == shapes[name]
            },
        )
    )
    # The head comes last: an error in the backbone tells more.
    changed_shapes = {
        name: adapter.product_shape(name) for name in placed if name not in adapter.resized
    }
    changed_shapes |= {n: adapter.checkpoint.tensors[tensor].shape for n, tensor in saved.items()}
    for name, shape in changed_shapes.items():
        _require_shape(where, name, shape, shapes[name])
        magnitude = placed[name].magnitude if name in placed else None
        outputs = shape[0] if magnitude is None or placed[name].form == "linear" else shape[1]
        if magnitude is not None and tensors[magnitude].shape != (outputs,):
            raise InputError(
                f"{where} has {magnitude} of shape {tensors[magnitude].shape} for {outputs} "
                f"outputs of {name}; copy the adapter again"
            )
    if tied and not config.get("ensure_weight_tying"):
        outputs = [checkpoint.read(tensor) for tensor in second_names.values()]
        for name in tied:
            _require_tied(where, adapter, name, outputs)
    return adapter


def _classes_of(head: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the number of classes of a head: the outputs that none of its layers takes in.

    Args:
        head: The shapes of its parameters.
    """
    matrices = [shape for shape in head.values() if len(shape) == 2]
    taken_in = {inputs for _, inputs in matrices}
    given_out = [outputs for outputs, _ in matrices]
    return next((size for size in given_out if size not in taken_in), max(given_out, default=0))


def open_saved(source: str, folder: Path, base: Checkpoint, *, role: str) -> Checkpoint:
    """Opens what an adapter saved whole, such as tables of tokens to which it added rows.

    Args:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files.
        base: The model that it changes.
        role: Its role in the merge, for messages.

    Returns:
        Its files, with the tensors that are no factors by the names of their parameters. Names may
        lack a prefix.

    Raises:
        InputError: Its weights are missing or damaged.
    """
    tensors = _read_tensors(folder, f"{role} ({source})")
    saved = {name: tensors[tensor] for name, tensor in _saved_whole(tensors).items()}
    return Checkpoint(source, folder, base.config, base.config_fields, saved)


def parameter_names(source: str, folder: Path, *, role: str) -> list[str]:
    """Returns the names of the parameters that an adapter changes, as modules have them.

    Args:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files.
        role: Its role in the merge, for messages.

    Raises:
        InputError: Its weights are missing or damaged.
    """
    tensors = _read_tensors(folder, f"{role} ({source})")
    names = (tensor.removeprefix(PREFIX) for tensor in tensors)
    factored = [
        f"{name.removesuffix(ending)}.weight"
        for name in names
        if (ending := _ending(name)) in _FACTORS
    ]
    return [*factored, *_saved_whole(tensors)]


def _read_tensors(folder: Path, where: str) -> dict[str, TensorInfo]:
    """Reads the header of an adapter's weights; names are as PEFT writes them, without wrappers.

    Raises:
        InputError: There is no such file, it is damaged, or it has no tensors, empty ones, or ones
            that are not of floating point.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{where} has no {WEIGHTS_FILE}; save the adapter with `save_pretrained`, which "
            "writes safetensors"
        )
    try:
        in_file = read_header(folder / WEIGHTS_FILE)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not in_file:
        raise InputError(
            f"{where}: {WEIGHTS_FILE} holds no tensors, so that it changes nothing; save the "
            "adapter again after training, gathered from all processes, or leave it out"
        )
    require_filled({name: info.shape for name, info in in_file.items()}, where)
    for name, info in in_file.items():
        if info.dtype not in PARAMETER_DTYPES:
            raise InputError(
                f"{where}: {name} is stored as {info.dtype}; expected float32, float16 or "
                "bfloat16: save the adapter again in one of these"
            )
    names = {name: without_marks(name).removeprefix("module.") for name in in_file}
    if len(set(names.values())) < len(names):
        return in_file
    # The name of the adapter is in the names where a state was saved without PEFT's function.
    return {_DEFAULT_ADAPTER.sub(r"\1\2", name): in_file[tensor] for tensor, name in names.items()}


def _find_parts(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
    renamed: Sequence[tuple[str, str]],
    *,
    of_transposed: bool,
) -> tuple[dict[str, _FactorNames], dict[str, str]]:
    """Returns the factors, and the tensors saved whole, by the names of parameters in a checkpoint.

    The names may lack a prefix.

    Args:
        tensors: The adapter's tensors.
        config: Its config.
        where: The adapter, for messages.
        renamed: Pairs of a part of names in a checkpoint and its replacement in adapters.
        of_transposed: True for a model with transposed linear layers.
    """
    is_transposed = bool(config.get("fan_in_fan_out"))
    if is_transposed and not of_transposed:
        raise InputError(
            f"{where} is of transposed weights (fan_in_fan_out), which the base does not have; an "
            "adapter must be trained on the base"
        )

    def in_checkpoint(name: str) -> str:
        for of_checkpoint, of_adapter in renamed:
            name = name.replace(of_adapter, of_checkpoint)
        return name

    modules: dict[str, tuple[str, str]] = {}
    for tensor, info in tensors.items():
        name = tensor.removeprefix(PREFIX)
        ending = _ending(name)
        if ending is None:
            continue
        other = tensor.removesuffix(ending) + _OTHER[ending]
        if other not in tensors:
            raise InputError(f"{where} has {tensor} without {other}; copy it again")
        if len(info.shape) != 2:
            raise InputError(
                f"{where} has {tensor} of shape {info.shape}; only matrices are supported: "
                f"{MERGE_IT}"
            )
        if ending not in _FACTORS:
            continue
        rank, other_shape = info.shape[0], tensors[other].shape
        if other_shape[1:] != (rank,):
            raise InputError(
                f"{where} has {tensor} of shape {info.shape} and {other} of shape {other_shape}, "
                "which have no product; copy it again"
            )
        modules[name.removesuffix(ending)] = (tensor, other)
    ranks = {module: tensors[a].shape[0] for module, (a, _) in modules.items()}
    scaling = scalings(config, ranks, where)
    saved = _saved_whole(tensors)

    def form(module: str, a: str) -> Form:
        if a.endswith("lora_embedding_A"):
            return "embedding"
        return "transposed" if is_transposed and module not in _OUTPUT_LAYERS else "linear"

    factors = {
        in_checkpoint(f"{module}.weight"): _FactorNames(
            a,
            b,
            scaling[module],
            form(module, a),
            _take_magnitude(saved, module, a, where) if config.get("use_dora") else None,
        )
        for module, (a, b) in modules.items()
    }
    whole = {in_checkpoint(name): tensor for name, tensor in saved.items()}
    # Beside the factors of an embedding table PEFT saves the table itself, as it was in the base.
    return factors, {name: tensor for name, tensor in whole.items() if name not in factors}


def _take_magnitude(saved: dict[str, str], module: str, a: str, where: str) -> str:
    """Takes the vector of a DoRA's module out of the tensors saved whole, and returns its name.

    Raises:
        InputError: There is none, or the module is an embedding table.
    """
    if a.endswith("lora_embedding_A"):
        raise InputError(
            f"{where} uses DoRA on the embedding table {module}, which is not supported; {MERGE_IT}"
        )
    found = [saved.pop(module + ending) for ending in _MAGNITUDES if module + ending in saved]
    if not found:
        raise InputError(
            f"{where} is a DoRA by its {CONFIG_FILE}, and {module} has no lora_magnitude_vector in "
            f"{WEIGHTS_FILE}; both files must come from one training: copy the adapter again"
        )
    return found[0]


def _modules_to_save(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of parameters in modules that an adapter's config says are saved whole."""
    modules = config.get("modules_to_save")
    if not isinstance(modules, list):
        return {}
    return {
        name: shape
        for name, shape in shapes.items()
        if any(part in modules for part in name.split(".")[:-1])
    }


def _saved_whole(tensors: Iterable[str]) -> dict[str, str]:
    """Returns the tensors that are no factors, by the names of their parameters."""
    whole = {}
    for tensor in tensors:
        name = tensor.removeprefix(PREFIX)
        # With bias="all" PEFT saves the bias of a replaced module too, and that of the module in
        # its place once more.
        if _ending(name) is None and ".original_module." not in name:
            parameter = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            whole[parameter] = tensor
    return whole


def _ending(name: str) -> str | None:
    """Returns the ending of a factor's name; None for other tensors."""
    return next((ending for ending in _OTHER if name.endswith(ending)), None)


def _with_classes(config: PretrainedConfig, classes: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_labels = classes
    return config


def _require_tied(
    where: str, adapter: MatchedAdapter, name: str, outputs: Sequence[np.ndarray]
) -> None:
    """Refuses embeddings that were trained apart from the output layer: a merge has one for both.

    Args:
        where: The adapter's role and source, for the message.
        adapter: The adapter.
        name: The table's name.
        outputs: The output layer as the adapter saved it, if it did.
    """
    if outputs:
        table = adapter.read(name)
        same = all(np.array_equal(table[: len(output)], output[: len(table)]) for output in outputs)
    else:
        same = not adapter.changes(name)
    if not same:
        raise InputError(
            f"{where} makes {name} differ from the output layer, while in the base they are one, "
            "as PEFT does without ensure_weight_tying; train it with that, or leave both as they "
            "are"
        )


def _require_shape(where: str, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise InputError(
            f"{where} changes {name} of shape {tuple(shape)}, the base's has {tuple(expected)}; "
            "an adapter must be trained on the base"
        )
