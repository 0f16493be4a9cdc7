"""Reading and writing PEFT adapters: LoRA factors and what was saved whole beside them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from adamerge_jax.checkpoints.finite import require_finite
from adamerge_jax.checkpoints.folders import new_folder
from adamerge_jax.checkpoints.huggingface import INDEX_FILE, Checkpoint
from adamerge_jax.checkpoints.huggingface import WEIGHTS_FILE as MODEL_FILE
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, find_names
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, read_header
from adamerge_jax.errors import InputError, and_more, in_one_line
from adamerge_jax.parameter_names import matches

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
"""What PEFT puts in front of the wrapped model's own names."""

_FACTORS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
"""How the names of the two factors end."""

_LINEAR_ENDINGS, _EMBEDDING_ENDINGS = _FACTORS.items()

_OTHER = _FACTORS | {b: a for a, b in _FACTORS.items()}
"""The ending of the other factor."""

_MERGE_IT = "merge it into its model with PEFT's merge_and_unload() and give that"

_UNSUPPORTED = {
    "use_dora": "DoRA, which rescales the merged weights",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with biases of its own",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable token indices",
    "target_parameters": "LoRA on parameters rather than modules",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which has singular values between its factors",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
"""Fields of a config that change what an adapter means, and what they turn on."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which PEFT changes the base's own weights."""

_DEFAULT_ALPHA = 8
"""PEFT's."""


class Factors(NamedTuple):
    """A task vector of one matrix as a product, `left @ right`.

    Attributes:
        left: `[m, r]`, the scaled B; for an embedding table, the scaled A transposed.
        right: `[r, n]`.
        embedding: Whether it is of an embedding table.
    """

    left: Float[np.ndarray, "m r"]
    right: Float[np.ndarray, "r n"]
    embedding: bool


class _Names(NamedTuple):
    a: str
    b: str
    scaling: float

    @property
    def embedding(self) -> bool:
        return self.a.endswith("lora_embedding_A")


@dataclass(frozen=True, eq=False)
class MatchedAdapter:
    """A LoRA adapter whose tensors are known by the names of the model it changes.

    It reads like a `MatchedCheckpoint` of the model that it makes of the base.

    Attributes:
        checkpoint: The adapter's files, with the config of the model it makes.
        role: What it is in the merge, for messages: `expert 'trec'`.
        base: The model that it changes.
        factors: The names in the file of the two factors, and their scaling, by parameter.
        saved: The name in the file of every parameter that was saved whole.
    """

    checkpoint: Checkpoint
    role: str
    base: MatchedCheckpoint
    factors: Mapping[str, _Names] = field(repr=False)
    saved: Mapping[str, str] = field(repr=False)

    @property
    def names(self) -> Mapping[str, str]:
        """Every parameter of the model that it makes, with a name in one of the files."""
        return {**self.base.names, **self.saved}

    def identity(self) -> str:
        """A fingerprint of its contents: the tensors, and what PEFT multiplies them with."""
        scalings = sorted((own.a, own.scaling) for own in self.factors.values())
        return self.checkpoint.identity(json.dumps(scalings))

    def has_factors(self, name: str) -> bool:
        """Whether a parameter's task vector is stored as factors."""
        return name in self.factors

    def low_rank(self, name: str) -> Factors | None:
        """The factors of one parameter's task vector, float32, or None where it has none.

        Raises:
            InputError: They have NaN or infinite values.
        """
        if name not in self.factors:
            return None
        own = self.factors[name]
        a, b = (self._read(each).astype(np.float32) for each in (own.a, own.b))
        left, right = (a.T, np.ascontiguousarray(b.T)) if own.embedding else (b, a)
        return Factors(left * np.float32(own.scaling), right, own.embedding)

    def read(self, name: str) -> np.ndarray:
        """Reads one parameter of the model that it makes; a changed one is float32.

        Raises:
            InputError: It has NaN or infinite values.
        """
        if name in self.saved:
            return self._read(self.saved[name])
        factors = self.low_rank(name)
        if factors is None:
            return self.base.read(name)
        return self.base.read(name).astype(np.float32) + factors.left @ factors.right

    def changes(self, name: str) -> bool:
        """Whether it may differ from the base in a parameter."""
        return name in self.saved or name in self.factors

    def _read(self, tensor: str) -> np.ndarray:
        array = self.checkpoint.read(tensor)
        require_finite(array, tensor=tensor, checkpoint=self.checkpoint, role=self.role)
        return array


Expert = MatchedCheckpoint | MatchedAdapter
"""A whole fine-tuned model, or an adapter."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    # Trainers leave the base's config.json beside an adapter, and an adapter's beside a model.
    whole = any((folder / file).is_file() for file in (MODEL_FILE, INDEX_FILE))
    return (folder / CONFIG_FILE).is_file() and not whole


def open_adapter(
    source: str,
    folder: Path,
    base: MatchedCheckpoint,
    *,
    role: str,
    head: Callable[[PretrainedConfig], Mapping[str, tuple[int, ...]]],
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    unused: Sequence[str] = (),
    renamed: Sequence[tuple[str, str]] = (),
    tied: Sequence[str] = (),
) -> MatchedAdapter:
    """Opens a LoRA adapter and finds the parameters that it changes.

    Args:
        source: What the user wrote.
        folder: Where its files are.
        base: The model that it changes.
        role: What it is in the merge, for messages: `expert 'trec'`.
        head: Shapes of the parameters of a task's head, from a config with the number of classes.
        prefixes: Prefixes of parameter names that the adapter may lack.
        ignored: Name patterns of tensors that are no parameters but second names of tied weights.
        unused: Name patterns of what it may change and is not used: modules outside the backbone.
        renamed: Parts of names in a checkpoint, and what they may be in an adapter.
        tied: Names of the embedding tables that are the output layer too, to be checked for
            whether they still are: what was saved whole of them is read.

    Raises:
        InputError: It is damaged, no LoRA, a kind of LoRA that is not supported, or was not
            trained on this base.
    """
    where = f"{role} ({source})"
    config = _read_config(folder, where)
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{where} has no {WEIGHTS_FILE}; save the adapter with `save_pretrained`, which "
            "writes safetensors"
        )
    try:
        tensors = read_header(folder / WEIGHTS_FILE)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    factors, whole = _find_parts(tensors, config, where, renamed)
    second_names = {name: whole.pop(name) for name in list(whole) if matches(name, ignored)}
    if config.get("ensure_weight_tying"):
        factors = {name: own for name, own in factors.items() if not matches(name, ignored)}
    checkpoint = Checkpoint(source, folder, base.checkpoint.config, tensors)
    shapes = {name: base.shape(name) for name in base.names}
    in_adapter = find_names((*factors, *whole), shapes, prefixes)
    placed = {name: factors[own] for name, own in in_adapter.items() if own in factors}
    saved = {name: whole[own] for name, own in in_adapter.items() if own in whole}
    used = set(in_adapter.values())
    lost = sorted(n for n in (*factors, *whole) if n not in used and not matches(n, unused))
    if lost:
        # Of a head's names the last is its output layer's weight, which has a row for each class.
        classes = tensors[whole[lost[-1]]].shape[0] if lost[-1] in whole else 0
        checkpoint = dataclasses.replace(checkpoint, config=_with_classes(checkpoint, classes))
        expected = head(checkpoint.config)
        if untrained := [name for name in lost if name in expected and name in factors]:
            raise InputError(
                f"{where} has factors for {untrained[0]} and not what they are added to, the "
                "head's own weights; train the head with modules_to_save"
            )
        own = {name: whole[name] for name in lost if name in expected}
        saved |= own
        shapes |= expected
        lost = [name for name in lost if name not in own]
    if lost:
        raise InputError(
            f"{where} changes {lost[0]}{and_more(len(lost) - 1)}, which the base "
            f"({base.checkpoint.source}) does not have; an adapter must be trained on the base"
        )
    adapter = MatchedAdapter(checkpoint, role, base, placed, saved)
    # The head comes last: what is wrong with the backbone says more.
    found = {name: _product_shape(own, tensors) for name, own in placed.items()}
    found |= {name: tensors[tensor].shape for name, tensor in saved.items()}
    for name, shape in found.items():
        _require_shape(where, name, shape, shapes[name])
    if tied and not config.get("ensure_weight_tying"):
        outputs = [checkpoint.read(tensor) for tensor in second_names.values()]
        for name in tied:
            _require_tied(where, adapter, name, outputs)
    return adapter


class AdapterWeights(NamedTuple):
    """One module of an adapter to be written: its delta is `b @ a`.

    Attributes:
        a: `[r, n]`.
        b: `[m, r]`.
        embedding: Whether the module is an embedding table, whose factors PEFT keeps transposed.
    """

    a: Float[np.ndarray, "r n"]
    b: Float[np.ndarray, "m r"]
    embedding: bool = False


def save_adapter(
    folder: Path,
    modules: Mapping[str, AdapterWeights],
    *,
    base: str,
    task_type: str | None,
    revision: str | None = None,
) -> None:
    """Writes a LoRA adapter that PEFT loads.

    Args:
        folder: The folder to make.
        modules: Factors by module name, such as `model.layers.0.mlp.up_proj`.
        base: Name or folder of the model that it changes.
        task_type: `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`; None for a
            model that PEFT has no class for.
        revision: The base's, where it is on the Hub.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is full.
    """
    ranks = {module: weights.a.shape[0] for module, weights in modules.items()}
    rank = max(ranks.values())
    others = {re.escape(module): own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        # The scaling of each module is alpha / r = 1: it is in the factors.
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for module, (a, b, embedding) in modules.items():
        first, second = _EMBEDDING_ENDINGS if embedding else _LINEAR_ENDINGS
        tensors[f"{_PREFIX}{module}{first}"] = np.ascontiguousarray(b.T if embedding else a)
        tensors[f"{_PREFIX}{module}{second}"] = np.ascontiguousarray(a.T if embedding else b)
    with new_folder(folder) as partial:
        text = json.dumps(config, indent=2) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        file = partial / WEIGHTS_FILE
        # safetensors makes files that only their owner may read; this one gets what the umask says.
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {CONFIG_FILE} is not JSON: {in_one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{where}: {CONFIG_FILE} holds no fields; copy or download it again")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where} is an adapter of type {config.get('peft_type')!r}; only LORA is supported: "
            f"{_MERGE_IT}"
        )
    for name, what in _UNSUPPORTED.items():
        if config.get(name):
            raise InputError(f"{where} uses {what}, which is not supported as factors; {_MERGE_IT}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise InputError(
            f"{where} has init_lora_weights {start!r}, which changes the base's own weights: "
            "its factors alone are no task vector; save it with "
            f"path_initial_model_for_weight_conversion, or {_MERGE_IT}"
        )
    return config


def _find_parts(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
    renamed: Sequence[tuple[str, str]],
) -> tuple[dict[str, _Names], dict[str, str]]:
    """The factors, and the tensors saved whole, by the names that parameters have in a checkpoint.

    They may lack a prefix.
    """

    def in_checkpoint(name: str) -> str:
        for of_checkpoint, of_adapter in renamed:
            name = name.replace(of_adapter, of_checkpoint)
        return name

    factors, whole = {}, {}
    for tensor, info in tensors.items():
        name = tensor.removeprefix(_PREFIX)
        ending = next((each for each in _OTHER if name.endswith(each)), None)
        if ending is None:
            # With bias="all" PEFT saves the bias of a replaced module too, and that of the module
            # in its place once more.
            if ".original_module." not in name:
                own = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                whole[in_checkpoint(own)] = tensor
            continue
        other = tensor.removesuffix(ending) + _OTHER[ending]
        if other not in tensors:
            raise InputError(f"{where} has {tensor} without {other}; copy it again")
        if len(info.shape) != 2:
            raise InputError(
                f"{where} has {tensor} of shape {info.shape}; only matrices are supported: "
                f"{_MERGE_IT}"
            )
        if ending not in _FACTORS:
            continue
        rank, of_other = info.shape[0], tensors[other].shape
        if of_other[1:] != (rank,):
            raise InputError(
                f"{where} has {tensor} of shape {info.shape} and {other} of shape {of_other}, "
                "which have no product; copy it again"
            )
        module = name.removesuffix(ending)
        found = _Names(tensor, other, _scaling(config, module, rank))
        factors[in_checkpoint(f"{module}.weight")] = found
    # Beside the factors of an embedding table PEFT saves the table itself, as it was in the base.
    return factors, {name: tensor for name, tensor in whole.items() if name not in factors}


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(own, config.get("lora_alpha", _DEFAULT_ALPHA))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _with_classes(checkpoint: Checkpoint, classes: int) -> PretrainedConfig:
    config = copy.deepcopy(checkpoint.config)
    config.num_labels = classes
    return config


def _require_tied(
    where: str, adapter: MatchedAdapter, name: str, outputs: Sequence[np.ndarray]
) -> None:
    """Refuses embeddings that were trained apart from the output layer: a merge has one for both.

    Args:
        where: What the adapter is, for the message.
        adapter: The adapter.
        name: Of the table.
        outputs: The output layer as the adapter saved it, if it did.
    """
    if outputs:
        table = adapter.read(name)
        same = all(np.array_equal(table, output) for output in outputs)
    else:
        same = not adapter.changes(name)
    if not same:
        raise InputError(
            f"{where} makes {name} differ from the output layer, while in the base they are one, "
            "as PEFT does without ensure_weight_tying; train it with that, or leave both as they "
            "are"
        )


def _product_shape(own: _Names, tensors: Mapping[str, Any]) -> tuple[int, ...]:
    a, b = tensors[own.a].shape, tensors[own.b].shape
    return (a[1], b[0]) if own.embedding else (b[0], a[1])


def _require_shape(where: str, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{where} changes {name} of shape {tuple(found)}, the base's has {tuple(expected)}; "
            "an adapter must be trained on the base"
        )
