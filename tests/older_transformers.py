"""Saves the logits of models; run under the Python of another version of `transformers`.

    python tests/older_transformers.py JOB.json

JOB.json lists models: `[{"folder": ..., "model_class": ..., "inputs": {...}, "out": ...}]`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def logits_of(folder: str, model_class: str, inputs: dict[str, list]) -> np.ndarray:
    """Loads a model in float32 and returns its logits."""
    loader = getattr(transformers, model_class)
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    with torch.no_grad():
        return model.eval()(**{n: torch.tensor(v) for n, v in inputs.items()}).logits.numpy()


def main() -> None:
    """Computes what a file of jobs asks for, and prints the version that did."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        np.save(job["out"], logits_of(job["folder"], job["model_class"], job["inputs"]))
    print(transformers.__version__)


if __name__ == "__main__":
    main()
