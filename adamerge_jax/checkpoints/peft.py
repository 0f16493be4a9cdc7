"""PEFT adapters: task vectors as LoRA factors, and the parameters saved whole beside them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.finite import LARGEST, require_finite
from adamerge_jax.checkpoints.huggingface import INDEX_FILE, Checkpoint
from adamerge_jax.checkpoints.huggingface import WEIGHTS_FILE as MODEL_FILE
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, find_names
from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, read_adapter_config
from adamerge_jax.checkpoints.peft_tensors import (
    TRANSPOSED_TYPES,
    FactorNames,
    Form,
    find_parts,
    read_tensors,
)
from adamerge_jax.checkpoints.renamed import renamed as names_of_other_versions
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        of_base: The parameters of its head that it left as they are in the base's file: a
            ModernBERT's `head.dense` below the classifier that it trained.
        left_out: The tokens of its tokenizer that the merge has no rows for.
        resized: The embedding tables and output layers whose factors have other rows than the
            base: rows that they lack are 0, and further ones are left out.
    """

    checkpoint: Checkpoint
    role: str
    base: MatchedCheckpoint
    factors: Mapping[str, FactorNames] = field(repr=False)
    saved: Mapping[str, str] = field(repr=False)
    trained_on: str | None = None
    of_base: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    resized: frozenset[str] = frozenset()

    @property
    def names(self) -> Mapping[str, str]:
        """The parameters of the model that it makes, with their names in one of the files."""
        return {**self.base.names, **{name: name for name in self.of_base}, **self.saved}

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
            return dataclasses.replace(self.base, names={name: name}).read(name)
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
            return self.base.checkpoint.tensors[name]
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
    tensors = read_tensors(folder, where)
    of_transposed = base.checkpoint.config.model_type in TRANSPOSED_TYPES
    factors, whole = find_parts(tensors, config, where, renamed, of_transposed=of_transposed)
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
            of_base=tuple(
                name
                for name in base.extra
                if name in left and of_base.tensors[name].shape == shapes[name]
            ),
        )
    )
    # The head comes last: an error in the backbone tells more.
    changed_shapes = {
        name: adapter.product_shape(name) for name in placed if name not in adapter.resized
    }
    changed_shapes |= {n: adapter.checkpoint.tensors[tensor].shape for n, tensor in saved.items()}
    for name, shape in changed_shapes.items():
        _require_shape(where, name, shape, shapes[name])
    for name, pair in placed.items():
        outputs = shapes[name][0 if pair.form == "linear" else 1]
        if pair.magnitude is not None and tensors[pair.magnitude].shape != (outputs,):
            raise InputError(
                f"{where} has {pair.magnitude} of shape {tensors[pair.magnitude].shape} for "
                f"{outputs} outputs of {name}; copy the adapter again"
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
