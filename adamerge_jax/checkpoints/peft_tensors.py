"""The tensors in the files of PEFT adapters: factors, and parameters that were saved whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import PARAMETER_DTYPES, require_filled
from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, MERGE_IT, WEIGHTS_FILE, scalings
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, read_header
from adamerge_jax.checkpoints.wrappers import without_marks
from adamerge_jax.errors import InputError

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

TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""The types of models whose linear layers have weights `[inputs, outputs]`."""

_OUTPUT_LAYERS = ("lm_head", "score")
"""The linear layers of such models whose weights are not transposed."""

_DEFAULT_ADAPTER = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B))\.default(\.weight)?$")

_OTHER = _FACTORS | {b: a for a, b in _FACTORS.items()}
"""The ending of the other factor."""


Form = Literal["linear", "embedding", "transposed"]
"""The kinds of modules. An embedding table and a transposed linear layer have the product of the
factors transposed."""


class FactorNames(NamedTuple):
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


def read_tensors(folder: Path, where: str) -> dict[str, TensorInfo]:
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


def find_parts(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
    renamed: Sequence[tuple[str, str]],
    *,
    of_transposed: bool,
) -> tuple[dict[str, FactorNames], dict[str, str]]:
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
        in_checkpoint(f"{module}.weight"): FactorNames(
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
    tensors = read_tensors(folder, f"{role} ({source})")
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
    tensors = read_tensors(folder, f"{role} ({source})")
    names = (tensor.removeprefix(PREFIX) for tensor in tensors)
    factored = [
        f"{name.removesuffix(ending)}.weight"
        for name in names
        if (ending := _ending(name)) in _FACTORS
    ]
    return [*factored, *_saved_whole(tensors)]


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
