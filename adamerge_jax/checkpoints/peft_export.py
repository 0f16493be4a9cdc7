"""Writing a LoRA adapter for PEFT."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.folders import new_folder
from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, WEIGHTS_FILE
from adamerge_jax.checkpoints.peft_tensors import EMBEDDING_ENDINGS, LINEAR_ENDINGS, PREFIX, Form
from adamerge_jax.checkpoints.safetensors_file import write_tensors
from adamerge_jax.files.json_object import write_json


class AdapterWeights(NamedTuple):
    """One module of an adapter to be written; its delta is `b @ a`.

    Attributes:
        a: `[r, n]`.
        b: `[m, r]`.
        form: The kind of module; PEFT keeps the factors of all but linear ones transposed.
    """

    a: Float[np.ndarray, "r n"]
    b: Float[np.ndarray, "m r"]
    form: Form = "linear"


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
        base: The name or folder of the model that it changes.
        task_type: `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`; None for a
            model that PEFT has no class for.
        revision: The revision of the base, if it is on the Hub.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is full.
    """
    ranks = {module: weights.a.shape[0] for module, weights in modules.items()}
    rank = max(ranks.values())
    other_ranks = {re.escape(module): size for module, size in ranks.items() if size != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        # The scaling of each module is alpha / r = 1: it is in the factors.
        "lora_alpha": rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(weights.form == "transposed" for weights in modules.values()),
        "inference_mode": True,
    }
    tensors = {}
    for module, (a, b, form) in modules.items():
        first, second = EMBEDDING_ENDINGS if form == "embedding" else LINEAR_ENDINGS
        tensors[f"{PREFIX}{module}{first}"] = np.ascontiguousarray(a if form == "linear" else b.T)
        tensors[f"{PREFIX}{module}{second}"] = np.ascontiguousarray(b if form == "linear" else a.T)
    with new_folder(folder) as partial:
        write_json(partial / CONFIG_FILE, config)
        write_tensors(partial / WEIGHTS_FILE, dict(sorted(tensors.items())))
