"""Saves the logits of models and the token ids of a text, under another version of `transformers`.

    python tests/older_transformers.py JOB.json

JOB.json lists models: `[{"folder": ..., "model_class": ..., "inputs": {...}, "out": ...}]`. Folders
with a tokenizer have a `text` as well; its token ids, and the end token's, go to `out + ".ids"`.
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


def token_ids(folder: str, text: str) -> list[int]:
    """Returns the ids of a text and of the token that ends one (-1 if there is none)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    return [*tokenizer(text)["input_ids"], -1 if end is None else end]


def main() -> None:
    """Computes what a file of jobs asks for, and prints the version that did."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "text" in job:
            Path(job["out"] + ".ids").write_text(json.dumps(token_ids(job["folder"], job["text"])))
        np.save(job["out"], logits_of(job["folder"], job["model_class"], job["inputs"]))
    print(transformers.__version__)


if __name__ == "__main__":
    main()
