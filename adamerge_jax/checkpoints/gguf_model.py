"""A model in a GGUF file, under the names and in the form that `transformers` has it.

The `gguf` package knows which tensor of a file stands for which module of an architecture. What
llama.cpp's conversion changed is undone: rows of rotary queries and keys that lie in pairs (Llama),
a 1 added to norms (Gemma), experts stacked (mixtures).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.config_file import CONFIG_FILE, Fields, config_of, read_config_file
from adamerge_jax.checkpoints.config_limits import require_consistent, require_possible
from adamerge_jax.checkpoints.fused_experts import one_by_one
from adamerge_jax.checkpoints.gguf_file import GgufFile, GgufTensor, import_gguf, read_gguf
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER = "model.layers.0."

_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_NORMS_OF_HEADS = ("self_attn.q_norm", "self_attn.k_norm")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_EXPERTS = tuple(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down"))

_EMBEDDINGS = "token_embd.weight"

_ROTARY_FACTORS = "rope_freqs.weight"
"""The factors of scaled rotary positions, which `transformers` computes by its config."""


@dataclass(frozen=True)
class Layout:
    """The form of an architecture in GGUF files.

    Attributes:
        model_types: Types of models of `transformers` that have it; the first one is that of a
            file alone.
        class_name: The class of such a model.
        modules: The modules of a layer.
        pairs: True if rows of queries and keys are in pairs.
        shift: The number to add to norms.
        tells_config: True if the fields of a file are all that a config has.
    """

    model_types: tuple[str, ...]
    class_name: str
    modules: tuple[str, ...]
    pairs: bool = False
    shift: float = 0.0
    tells_config: bool = False


_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

LAYOUTS: dict[str, Layout] = {
    "llama": Layout(
        ("llama", "mistral"),
        "LlamaForCausalLM",
        (*_ATTENTION, *_NORMS, *_MLP),
        pairs=True,
        tells_config=True,
    ),
    "qwen2": Layout(
        ("qwen2",), "Qwen2ForCausalLM", (*_ATTENTION, *_NORMS, *_MLP), tells_config=True
    ),
    "qwen3": Layout(
        ("qwen3",),
        "Qwen3ForCausalLM",
        (*_ATTENTION, *_NORMS_OF_HEADS, *_NORMS, *_MLP),
        tells_config=True,
    ),
    "qwen3moe": Layout(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        (*_ATTENTION, *_NORMS_OF_HEADS, *_NORMS, "mlp.gate", *_EXPERTS),
    ),
    "phi3": Layout(
        ("phi3",),
        "Phi3ForCausalLM",
        ("self_attn.qkv_proj", "self_attn.o_proj", *_NORMS, "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "gemma2": Layout(
        ("gemma2",), "Gemma2ForCausalLM", (*_ATTENTION, *_GEMMA_NORMS, *_MLP), shift=-1.0
    ),
    "gemma3": Layout(
        ("gemma3_text",),
        "Gemma3ForCausalLM",
        (*_ATTENTION, *_NORMS_OF_HEADS, *_GEMMA_NORMS, *_MLP),
        shift=-1.0,
    ),
}
"""Layouts by the architecture that a file names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file.

    Attributes:
        model_types: The types of models of `transformers` that it may be.
        lacks: What a config made of its fields would lack, in words; '' for nothing.
    """

    model_types: tuple[str, ...]
    lacks: str


def open_gguf(source: str, file: Path) -> GgufCheckpoint:
    """Opens a model in a GGUF file; its config is the config.json beside it, if there is one.

    Args:
        source: The file, as the user wrote it.
        file: The file.

    Raises:
        InputError: It is damaged, no language model, of an architecture that is not known here, or
            has a tensor that is not.
    """
    content = read_gguf(file)
    architecture = content.fields.get("general.architecture")
    layout = LAYOUTS.get(architecture) if isinstance(architecture, str) else None
    if content.fields.get("general.type", "model") != "model":
        raise InputError(
            f"{file} holds no model but a part of one (general.type "
            f"{shorten(repr(content.fields['general.type']))}); give the file of a whole model"
        )
    experts = content.fields.get(f"{architecture}.expert_count", 0)
    if layout is None or (experts and layout.class_name == "LlamaForCausalLM"):
        kind = f"{architecture} with experts" if layout else architecture
        raise InputError(
            f"{file} is a GGUF file of the architecture {shorten(repr(kind))}; those that are read "
            f"are {', '.join(LAYOUTS)}: give the model in safetensors"
        )
    fields = _fields(file, content, architecture, layout)
    tensors = dict(_named(file, content, architecture, layout, fields))
    if (file.parent / CONFIG_FILE).is_file():
        fields, lacks = read_config_file(file.parent), ""
        config = config_of(file.parent, fields, tensors)
    else:
        lacks = _lacking(content, architecture, layout)
        config = _config(file, fields, tensors)
    if config.model_type not in layout.model_types:
        raise InputError(
            f"{file.parent / CONFIG_FILE} has model_type {config.model_type!r}, {file.name} is of "
            f"{' or '.join(layout.model_types)}; put the {CONFIG_FILE} of the model beside it"
        )
    kinds = sorted({info.type_name for info in content.tensors.values()})
    return GgufCheckpoint(
        source=source,
        folder=file.parent,
        config=config,
        config_fields=fields,
        tensors=tensors,
        notes=(
            f"{len(tensors)} tensors of a GGUF file ({', '.join(kinds)}) are restored while they "
            "are read",
        ),
        model_types=layout.model_types,
        lacks=lacks,
    )


def require_config(base: Checkpoint) -> None:
    """Refuses a GGUF file as the base if it does not say all that the merge's config must.

    Raises:
        InputError: With what is lacking.
    """
    if isinstance(base, GgufCheckpoint) and base.lacks:
        raise InputError(
            f"{base.source} does not say {base.lacks}, which the merge's {CONFIG_FILE} must; put "
            f"the {CONFIG_FILE} of the model beside the file"
        )


def require_same_sizes(base: Checkpoint, expert: GgufCheckpoint, *, role: str) -> None:
    """Refuses a GGUF file of another architecture than the base's.

    Its fields are few: what they do not say is not compared.

    Args:
        base: The base.
        expert: The expert.
        role: Its role in the merge, for messages: `expert 'law'`.

    Raises:
        InputError: With the first field that differs, and both of its values.
    """
    where = f"{role} ({expert.source})"
    of_base = base.config
    if of_base.model_type not in expert.model_types:
        raise InputError(
            f"{where} is a GGUF file of {' or '.join(expert.model_types)}, the base "
            f"({base.source}) has model_type {of_base.model_type!r}; an expert must be fine-tuned "
            "from the base"
        )
    for name in (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "rms_norm_eps"),
    ):
        values = getattr(of_base, name, None), getattr(expert.config, name, None)
        if None not in values and values[0] != values[1]:
            raise InputError(
                f"{where} has {name} {values[1]!r} in its GGUF file, the base ({base.source}) has "
                f"{values[0]!r}; an expert must be fine-tuned from the base"
            )


def _fields(file: Path, content: GgufFile, architecture: str, layout: Layout) -> Fields:
    """Returns the fields of a config that the fields of a file tell, by those `transformers` reads.

    Raises:
        InputError: A size is missing or is no whole number.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    model_type = layout.model_types[0]
    mapping: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    renamed = {n: f for n, f in mapping[model_type.removesuffix("_text")].items() if f}
    renamed |= {"attention.key_length": "head_dim"}
    fields: Fields = {"architectures": [layout.class_name], "model_type": model_type}
    for name, field in renamed.items():
        if (value := content.fields.get(f"{architecture}.{name}")) is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(
                    f"{file} has {shorten(repr(value))} for {architecture}.{name}, expected a "
                    "number"
                )
            fields[field] = value
    if _EMBEDDINGS not in content.tensors:
        raise InputError(f"{file} lacks {_EMBEDDINGS}; give the file of a whole model")
    table = content.tensors[_EMBEDDINGS].shape
    fields["vocab_size"], fields["hidden_size"] = table[0], table[-1]
    for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if name not in fields:
            raise InputError(f"{file} does not say its {name}; convert the model again")
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields["pad_token_id"] = None  # a class's own default is the id of one model's token
    for name, in_file in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = content.fields.get(f"tokenizer.ggml.{in_file}_token_id")
        if isinstance(token, int) and 0 <= token < fields["vocab_size"]:
            fields[f"{name}_token_id"] = token
    fields["tie_word_embeddings"] = "output.weight" not in content.tensors
    return fields


def _lacking(content: GgufFile, architecture: str, layout: Layout) -> str:
    """Returns what the fields of a file lack for a config, in words; '' for nothing."""
    if _ROTARY_FACTORS in content.tensors or f"{architecture}.rope.scaling.type" in content.fields:
        return "how its rotary positions are scaled"
    return "" if layout.tells_config else f"all settings of {architecture}"


def _config(file: Path, fields: Fields, tensors: Mapping[str, TensorInfo]) -> PretrainedConfig:
    """Returns the config of a model that a file describes by its own fields."""
    from transformers import AutoConfig

    require_possible(fields, str(file), tensors, usual=True)
    try:
        config = AutoConfig.for_model(**fields)
        require_consistent(config, str(file))
        return config
    except InputError:
        raise
    except Exception as error:  # a config's own validation raises errors of many types
        raise InputError(
            f"{file} describes no model that transformers knows: {shorten(str(error), 200)}"
        ) from error


def _named(
    file: Path, content: GgufFile, architecture: str, layout: Layout, fields: Mapping[str, Any]
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the tensors under the names of `transformers`.

    Raises:
        InputError: A tensor has no such name, or not the rows of so many heads or experts.
    """
    modules = _modules(file, architecture, layout)
    for name, info in content.tensors.items():
        if name == _ROTARY_FACTORS:
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d{1,5})\.(.+)", module)
        template = f"blk.0.{block[2]}" if block else module
        # Biases of queries and keys are in pairs too, and no field says that there are any.
        kinds = ("weight",) if layout.pairs else ("weight", "bias")
        if template not in modules or kind not in kinds:
            raise InputError(
                f"{file} has {name}, which is no tensor of the architecture {architecture} as it "
                "is read here; give the model in safetensors"
            )
        in_model = modules[template]
        if block:
            in_model = in_model.replace(_LAYER, f"model.layers.{block[1]}.")
        if layout.pairs and in_model.endswith(("q_proj", "k_proj")):
            info = _in_pairs(file, name, info, fields, is_query=in_model.endswith("q_proj"))
        if layout.shift and in_model.endswith(("norm", "_layernorm")):
            info = dataclasses.replace(info, shift=layout.shift)
        parent, _, leaf = in_model.rpartition(".")
        if parent.endswith(".experts"):
            yield from one_by_one(parent, [f"{leaf}.{kind}"], info)
        else:
            yield f"{in_model}.{kind}", info


def _modules(file: Path, architecture: str, layout: Layout) -> dict[str, str]:
    """Returns the modules of `transformers` by those of a GGUF file, layers as the first one."""
    gguf = import_gguf(file)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, 1)
    candidates = (*_OUTER, *(_LAYER + module for module in layout.modules))
    return {name: module for module in candidates if (name := names.get_name(module))}


def _in_pairs(
    file: Path, name: str, info: GgufTensor, fields: Mapping[str, Any], *, is_query: bool
) -> GgufTensor:
    """Returns rotary queries or keys whose rows are in pairs."""
    heads = fields["num_attention_heads" if is_query else "num_key_value_heads"]
    rows = info.shape[0]
    has_heads = isinstance(heads, int) and heads >= 1
    if not has_heads or len(info.shape) != 2 or not rows or rows % (2 * heads):
        raise InputError(
            f"{file} has {name} of shape {info.shape}, expected a matrix with an even number of "
            f"rows for each of {shorten(repr(heads))} heads"
        )
    return dataclasses.replace(info, heads=heads)
