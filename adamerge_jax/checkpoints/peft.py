"""Reading and writing PEFT adapters: LoRA factors and what was saved whole beside them."""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from adamerge_jax.checkpoints.huggingface import (
    Checkpoint,
    and_more,
    in_one_line,
    read_header,
    require_finite,
)
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, find_names
from adamerge_jax.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
"""What PEFT puts in front of the wrapped model's own names."""

_FACTORS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
"""How the names of the two factors end."""

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
    "megatron_config": "Megatron layers",
}
"""Fields of a config that change what an adapter means, and what they turn on."""


class Factors(NamedTuple):
    """A task vector of one matrix as a product, `left @ right`.

    Attributes:
        left: `[m, r]`, the scaled B; for an embedding table, the A transposed.
        right: `[r, n]`.
    """

    left: Float[np.ndarray, "m r"]
    right: Float[np.ndarray, "r n"]


class _Names(NamedTuple):
    a: str
    b: str
    scaling: float


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

    def low_rank(self, name: str) -> Factors | None:
        """The factors of one parameter's task vector, float32, or None where it has none.

        Raises:
            InputError: They have NaN or infinite values.
        """
        if name not in self.factors:
            return None
        own = self.factors[name]
        a, b = (self._read(each).astype(np.float32) for each in (own.a, own.b))
        if own.a.endswith("lora_embedding_A"):
            return Factors(a.T * np.float32(own.scaling), np.ascontiguousarray(b.T))
        return Factors(b * np.float32(own.scaling), a)

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


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def open_adapter(
    source: str,
    folder: Path,
    base: MatchedCheckpoint,
    *,
    role: str,
    head: Callable[[int], Mapping[str, tuple[int, ...]]],
    prefixes: Sequence[str] = (),
) -> MatchedAdapter:
    """Opens a LoRA adapter and finds the parameters that it changes.

    Args:
        source: What the user wrote.
        folder: Where its files are.
        base: The model that it changes.
        role: What it is in the merge, for messages: `expert 'trec'`.
        head: Shapes of the parameters of a task's head, from the number of its classes.
        prefixes: Prefixes of parameter names that the adapter may lack.

    Raises:
        InputError: It is damaged, no LoRA, a kind of LoRA that is not supported, or was not
            trained on this base.
    """
    where = f"{role} ({source})"
    config = _read_config(folder, where)
    tensors = read_header(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else None
    if tensors is None:
        raise InputError(
            f"{where} has no {WEIGHTS_FILE}; save the adapter with `save_pretrained`, which "
            "writes safetensors"
        )
    checkpoint = Checkpoint(source, folder, base.checkpoint.config, tensors)
    factors, whole = {}, {}
    for tensor in tensors:
        name = tensor.removeprefix(_PREFIX)
        ending = next((e for e in (*_FACTORS, *_FACTORS.values()) if name.endswith(e)), None)
        if ending is None:
            whole[name.replace(".base_layer.", ".")] = tensor
        elif ending in _FACTORS:
            module = name.removesuffix(ending)
            other = tensor.removesuffix(ending) + _FACTORS[ending]
            if other not in tensors:
                raise InputError(f"{where} has {tensor} without {other}; copy it again")
            if len(tensors[tensor].shape) != 2:
                raise InputError(
                    f"{where} has {tensor} for a convolution; only matrices are supported: merge "
                    "it into its model with PEFT's merge_and_unload() and give that"
                )
            rank = tensors[tensor].shape[0]
            factors[f"{module}.weight"] = _Names(tensor, other, _scaling(config, module, rank))
    shapes = {name: base.shape(name) for name in base.names}
    in_adapter = find_names((*factors, *whole), shapes, prefixes)
    placed = {name: factors[own] for name, own in in_adapter.items() if own in factors}
    saved = {name: whole[own] for name, own in in_adapter.items() if own in whole}
    lost = sorted({*factors, *whole} - set(in_adapter.values()))
    if lost:
        # Of a head's names the last is its output layer's weight, which has a row for each class.
        classes = tensors[whole[lost[-1]]].shape[0] if lost[-1] in whole else 0
        expected = head(classes)
        own = {name: whole[name] for name in lost if name in expected}
        saved |= own
        shapes |= expected
        lost = [name for name in lost if name not in own]
        checkpoint = Checkpoint(source, folder, _with_classes(checkpoint, classes), tensors)
    if lost:
        raise InputError(
            f"{where} changes {lost[0]}{and_more(len(lost) - 1)}, which the base "
            f"({base.checkpoint.source}) does not have; an adapter must be trained on the base"
        )
    adapter = MatchedAdapter(checkpoint, role, base, placed, saved)
    for name, tensor in saved.items():
        _require_shape(where, name, tensors[tensor].shape, shapes[name])
    for name, own in placed.items():
        _require_shape(where, name, _product_shape(own, tensors), shapes[name])
    return adapter


class AdapterWeights(NamedTuple):
    """One module of an adapter to be written."""

    a: Float[np.ndarray, "r n"]
    b: Float[np.ndarray, "m r"]


def save_adapter(
    folder: Path, modules: Mapping[str, AdapterWeights], *, base: str, task_type: str
) -> None:
    """Writes a LoRA adapter that PEFT loads: the delta of each module is `b @ a`.

    Args:
        folder: The folder to make.
        modules: Factors by module name, such as `model.layers.0.mlp.up_proj`.
        base: Name or folder of the model that it changes.
        task_type: `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`.
    """
    ranks = {module: weights.a.shape[0] for module, weights in modules.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        # The scaling of each module is alpha / r = 1: it is in the factors.
        "lora_alpha": rank,
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for module, weights in modules.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(weights.a)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(weights.b)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {CONFIG_FILE} is not JSON: {in_one_line(error)}") from error
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where} is an adapter of type {config.get('peft_type')!r}; only LORA is supported: "
            "merge it into its model with PEFT's merge_and_unload() and give that"
        )
    for name, what in _UNSUPPORTED.items():
        if config.get(name):
            raise InputError(
                f"{where} uses {what}, which is not supported as factors; merge it into its model "
                "with PEFT's merge_and_unload() and give that"
            )
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(own, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _with_classes(checkpoint: Checkpoint, classes: int) -> Any:
    config = copy.deepcopy(checkpoint.config)
    config.num_labels = classes
    return config


def _product_shape(own: _Names, tensors: Mapping[str, Any]) -> tuple[int, ...]:
    a, b = tensors[own.a].shape, tensors[own.b].shape
    return (a[1], b[0]) if own.a.endswith("lora_embedding_A") else (b[0], *a[1:])


def _require_shape(where: str, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{where} changes {name} of shape {tuple(found)}, the base's has {tuple(expected)}; "
            "an adapter must be trained on the base"
        )
