"""The experts of a mixture one by one, also where a file has them stacked.

`transformers` 5 keeps the experts of a layer as two stacks and saves them one by one, as the files
of the Hub have them, unless it is told to save what it keeps. Both are read as one by one: that is
what every version of `transformers` opens, and each has coefficients of its own then. A part of a
stack lies in one piece, so that nothing is copied for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError

_MOST_EXPERTS = 4096
"""Experts of a layer; a file with more has another meaning."""


class Layout(NamedTuple):
    """The names of experts that are saved one by one.

    Attributes:
        gate: The module that is the first half of the stack `gate_up_proj`.
        up: The module that is the second half.
        down: The module that is the stack `down_proj`.
        renamed: Parts of names of the model in `transformers` and what stands for them in files,
            in the order of replacement.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    renamed: tuple[tuple[str, str], ...] = ()


_GATED = Layout()
_NUMBERED = Layout("w1", "w3", "w2", ((".mlp.", ".block_sparse_moe."),))

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
            *("flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa"),
            *("hunyuan_v1_moe", "jamba", "longcat_flash", "olmoe", "qwen2_moe", "qwen3_moe"),
            *("qwen3_next", "solar_open"),
        ),
        _GATED,
    ),
    "lfm2_moe": Layout("w1", "w3", "w2"),
    "minimax": _NUMBERED,
    "mixtral": _NUMBERED,
    "phimoe": _NUMBERED._replace(
        renamed=((".mlp.router.weight", ".mlp.gate.weight"), *_NUMBERED.renamed)
    ),
}
"""The names of experts in files by `model_type`, as `transformers.conversion_mapping` has them."""


def with_experts_apart(
    model_type: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], int]:
    """Returns the tensors of a checkpoint, those of stacked experts one by one.

    Args:
        model_type: The type of model in its config.
        tensors: The tensors of its files by name.

    Returns:
        The tensors by the names of files of the Hub, and the number of stacks among them.
    """
    layout = LAYOUTS.get(model_type)
    stacks = {name for name, info in tensors.items() if layout and _is_stack(name, info)}
    if not stacks:
        return dict(tensors), 0
    apart: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        in_file = _renamed(name, layout)
        if name in stacks:
            experts, _, kind = in_file.rpartition(".")
            modules = (layout.down,) if kind == "down_proj" else (layout.gate, layout.up)
            apart |= one_by_one(experts, [f"{module}.weight" for module in modules], info)
        else:
            apart[in_file] = info
    return apart, len(stacks)


def one_by_one(
    experts: str, parts: Sequence[str], stack: TensorInfo
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the weights of experts in a stack `[experts, outputs, inputs]`.

    Args:
        experts: The module of the experts, such as `model.layers.0.mlp.experts`.
        parts: The names that an expert's weights have below its number, each of as many outputs.
        stack: The stack.

    Raises:
        InputError: It has another number of axes, or more experts than a layer has.
    """
    if not _has_experts(stack):
        raise InputError(
            f"{stack.file} has a stack of {experts} of shape {stack.shape}, expected (experts, "
            f"outputs, inputs) with {_MOST_EXPERTS} experts at most; copy or download it again"
        )
    count, outputs, inputs = stack.shape
    shape = (outputs // len(parts), inputs)
    first = 0
    for expert in range(count):
        for part in parts:
            yield f"{experts}.{expert}.{part}", stack.part(first, shape)
            first += prod(shape)


def _is_stack(name: str, info: TensorInfo) -> bool:
    """Returns True for the stacked weights of a layer's experts, which have values."""
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")) or not _has_experts(info):
        return False
    return not name.endswith(".gate_up_proj") or info.shape[1] % 2 == 0


def _has_experts(info: TensorInfo) -> bool:
    """Returns True for a tensor of the form of a stack, which has values."""
    return len(info.shape) == 3 and prod(info.shape) > 0 and info.shape[0] <= _MOST_EXPERTS


def _renamed(name: str, layout: Layout) -> str:
    for in_model, in_file in layout.renamed:
        name = name.replace(in_model, in_file)
    return name
