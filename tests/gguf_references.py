"""GGUF files of tiny models, written by the `gguf` package as llama.cpp's conversion has them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

Q8_0, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "F16", "F32"))


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    architecture: str,
    *,
    fields: Mapping[str, Any] | None = None,
    further: Mapping[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = Q8_0,
) -> None:
    """Writes a model, its matrices in `kind` and its vectors in float32.

    Args:
        model: The model; its state has the names that `transformers` has in memory.
        file: The file.
        architecture: Its name in GGUF files.
        fields: Fields beside those of a config, or in place of them.
        further: Tensors beside those of the model, by their names in the file.
        kind: The type of matrices.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    sizes = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": (config.rope_parameters or {}).get("rope_theta"),
    }
    for name, value in sizes.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    for name, value in numbers.items():
        if value is not None:
            writer.add_float32(f"{architecture}.{name}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(config.vocab_size)])
    for name, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name, value)
    tied = config.tie_word_embeddings
    for name, tensor in _separate(model.state_dict()):
        if tied and name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        module, _, ending = name.rpartition(".")
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = "num_attention_heads" if "q_proj" in module else "num_key_value_heads"
            array = _in_pairs(array, getattr(config, heads))
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        stored = kind if array.ndim > 1 else F32
        writer.add_tensor(
            f"{names.get_name(module)}.{ending}", gguf.quantize(array, stored), raw_dtype=stored
        )
    for name, array in (further or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _separate(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields tensors, the stacks of gates and ups of experts as two."""
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up", part) + ".weight", half
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


def one_by_one(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a model as they are saved: experts one by one, tied ones once."""
    for name, tensor in _separate(model.state_dict()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        before, stack, module = name.partition(".experts.")
        if not stack:
            yield name, array
        for expert, weight in enumerate(array if stack else ()):
            yield f"{before}.experts.{expert}.{module}", weight


def _in_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Returns rotary rows as llama.cpp has them: first and second halves of heads in turn."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
