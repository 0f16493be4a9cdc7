"""What `plan` predicts and what `learn` takes: `python experiments/benchmarks/plan.py`.

For merges of five kinds, with random weights, in a temporary folder:

- an encoder of texts, one coefficient per row, aligned with the experts' logits,
- a vision transformer, one coefficient per tensor, by entropy,
- a language model with whole experts, aligned with the likely tokens,
- the same with LoRA adapters,
- eight whole experts of a Llama of a fiftieth of 7 billion parameters, in bfloat16, with task
  vectors in 4 bits and in microbatches: as advised for eight experts of 7 billion.

`--headers` runs `adamerge plan` for eight experts of 7 billion parameters instead, of whose weights
there are the headers alone (files with holes, which take no disk), and prints its seconds.

The plan and the merge run each in a process of its own. The peak is the resident size of the
process where the device is the CPU, elsewhere what the device's allocator reports.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from jax.typing import DTypeLike
from processes import in_own_process
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from adamerge_jax.checkpoints.huggingface_export import save_model
from adamerge_jax.checkpoints.peft_export import AdapterWeights, save_adapter
from adamerge_jax.cli.console import make_console
from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import is_stacked, tensors_of

TASKS = 4
STEPS = 2
CLASSES = 5


def save_weights(
    folder: Path,
    config: PretrainedConfig,
    seed: int,
    *,
    head: bool,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a model with random weights."""
    family = family_of(config)
    shapes = family.build_backbone(config).shapes | (
        family.build_head(config).shapes if head else {}
    )
    generator = np.random.default_rng(seed)
    save_model(
        folder,
        config,
        {
            name: (
                0.02 * generator.standard_normal(leaf.shape, np.float32) + ("orm" in name)
            ).astype(dtype)
            for name, leaf in shapes.items()
        },
    )


def save_adapter_of(folder: Path, base: Path, config: PretrainedConfig, seed: int) -> None:
    """Writes an adapter of rank 16 on every matrix of a decoder's layers."""
    generator = np.random.default_rng(seed)
    modules = {}
    for name, leaf in family_of(config).build_backbone(config).shapes.items():
        if len(leaf.shape) != 3 or not is_stacked(name):
            continue
        _, m, n = leaf.shape
        for tensor in tensors_of(name, leaf.shape):
            modules[tensor.removesuffix(".weight")] = AdapterWeights(
                0.02 * generator.standard_normal((16, n), np.float32),
                0.02 * generator.standard_normal((m, 16), np.float32),
            )
    save_adapter(folder, modules, base=str(base), task_type="CAUSAL_LM")


def save_tokenizer(folder: Path, words: int) -> None:
    """Writes a tokenizer of the words `w0`, `w1`, ..."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{index}": index + 2 for index in range(words - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def save_texts(file: Path, words: int, count: int, lengths: tuple[int, int], seed: int) -> None:
    """Writes texts of random words, one per line."""
    generator = np.random.default_rng(seed)
    with file.open("w") as stream:
        for length in generator.integers(*lengths, count):
            text = " ".join(f"w{index}" for index in generator.integers(0, words - 2, length))
            stream.write(json.dumps({"text": text}) + "\n")


def text_encoder(folder: Path) -> dict[str, Any]:
    """A BERT of 22 M parameters with four whole experts."""
    words = 30000
    config = BertConfig(
        vocab_size=words,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CLASSES,
    )
    save_weights(folder / "base", config, 0, head=False)
    save_tokenizer(folder / "base", words)
    for task in range(TASKS):
        save_weights(folder / f"task{task}", config, task + 1, head=True)
        save_texts(folder / f"task{task}.jsonl", words, 20, (97, 127), task)
    return {"learning": {"batch_size": 8}, "evaluation": {"batch_size": 16}}


def vision(folder: Path) -> dict[str, Any]:
    """A ViT-S/16 of 22 M parameters with four whole experts."""
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        num_labels=CLASSES,
    )
    save_weights(folder / "base", config, 0, head=False)
    for task in range(TASKS):
        save_weights(folder / f"task{task}", config, task + 1, head=True)
        pixels = np.random.default_rng(task).standard_normal((8, 3, 224, 224), np.float32)
        np.savez(folder / f"task{task}.npz", pixel_values=pixels)
    return {"preset": "adamerging", "learning": {"batch_size": 6}}


def language_config() -> LlamaConfig:
    """Of a Llama of 52 M parameters."""
    return LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def language(folder: Path, *, adapters: bool) -> dict[str, Any]:
    """A Llama with four experts, whole ones or adapters."""
    config = language_config()
    save_weights(folder / "base", config, 0, head=True)
    save_tokenizer(folder / "base", config.vocab_size)
    for task in range(TASKS):
        expert = folder / f"task{task}"
        if adapters:
            save_adapter_of(expert, folder / "base", config, task + 1)
        else:
            save_weights(expert, config, task + 1, head=True)
            save_tokenizer(expert, config.vocab_size)
        save_texts(folder / f"task{task}.jsonl", config.vocab_size, 10, (100, 127), task)
    return {"learning": {"batch_size": 4}, "evaluation": {"batch_size": 8}}


def fiftieth(folder: Path) -> dict[str, Any]:
    """A Llama of 134 M parameters with eight experts, as `plan` advises for 7 billion."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    for seed, name in enumerate(["base", *(f"task{task}" for task in range(8))]):
        save_weights(folder / name, config, seed, head=True, dtype=jnp.bfloat16)
        save_tokenizer(folder / name, config.vocab_size)
    for task in range(8):
        save_texts(folder / f"task{task}.jsonl", config.vocab_size, 6, (50, 62), task)
    return {
        "task_vectors": {"dtype": "int4"},
        "learning": {
            "batch_size": 2,
            "microbatches": 2,
            "mix": "part",
            "rematerialize": "layer",
        },
        "evaluation": {"batch_size": 2},
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "encoder, by row, logit alignment": text_encoder,
    "ViT, by tensor, entropy": vision,
    "Llama, whole experts": lambda folder: language(folder, adapters=False),
    "Llama, LoRA adapters": lambda folder: language(folder, adapters=True),
    "Llama, 1/50 of 8 x 7B": fiftieth,
}


def write_recipe(folder: Path, kind: str) -> Path:
    """Makes the checkpoints and the data of a merge, and its recipe."""
    fields = KINDS[kind](folder)
    fields["learning"] |= {"steps": STEPS, "evaluate_every": STEPS}
    fields["base"] = "base"
    fields["tasks"] = {
        data.stem: {"expert": data.stem, "calibration": data.name}
        for data in sorted(folder.glob("task*.*"))
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def write_headers(folder: Path, config: PretrainedConfig) -> None:
    """Writes a checkpoint in bfloat16 whose weights are holes in a file."""
    family, header, size = family_of(config), {}, 0
    for name, leaf in family.build_backbone(config).shapes.items():
        stacked = is_stacked(name)
        for tensor in tensors_of(name, leaf.shape) if stacked else [name]:
            shape = leaf.shape[stacked:]
            end = size + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
            size = end
    text = json.dumps(header).encode()
    config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    save_tokenizer(folder, config.vocab_size)


def write_recipe_of_headers(folder: Path) -> Path:
    """Writes a recipe for eight experts of 7 B parameters, and the headers of their weights."""
    config, tasks = LlamaConfig(dtype="bfloat16", architectures=["LlamaForCausalLM"]), {}
    write_headers(folder / "base", config)
    for task in (f"task{number}" for number in range(8)):
        write_headers(folder / task, config)
        save_texts(folder / f"{task}.jsonl", config.vocab_size, 200, (100, 500), 0)
        data = f"{task}.jsonl"
        tasks[task] = {"expert": task, "calibration": data, "test": data}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": "base", "max_length": 512, "tasks": tasks}))
    return recipe


def plan_of_headers(device: str) -> None:
    """Runs `adamerge plan` for eight experts of 7 B parameters."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe_of_headers(Path(folder))
        command = [sys.executable, "-m", "adamerge_jax", "plan", recipe, "--device", device]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    console = make_console()
    console.print(f"{used.ru_utime + used.ru_stime:.1f} processor seconds, {seconds:.1f} in all")


def predict(recipe: Path) -> dict[str, float]:
    """Peak and seconds of a step as the plan has them."""
    from adamerge_jax import load_recipe
    from adamerge_jax.plan import make_plan

    plan = make_plan(load_recipe(recipe), recipe.parent)
    return {"peak": plan.peak, "step": plan.seconds.step}


def measure(recipe: Path) -> dict[str, float]:
    """Peak of a merge, and seconds of its last step."""
    from adamerge_jax.cli import main as cli
    from adamerge_jax.runs.record import peak_memory_of_arrays

    out = recipe.parent / "run"
    cli.main(["learn", str(recipe), "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["step"]]
    return {"peak": peak_memory_of_arrays(), "step": seconds[-1]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=list(KINDS), help="one merge only")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--headers", metavar="DEVICE", help="plan eight 7B experts for a device")
    arguments = parser.parse_args()
    if arguments.headers:
        plan_of_headers(arguments.headers)
        return
    if arguments.process:
        what, recipe = arguments.process
        print(json.dumps({"plan": predict, "learn": measure}[what](Path(recipe))))
        return
    table = Table(title="Peak memory (GB), seconds of a step")
    columns = ("predicted GB", "measured GB", "ratio", "predicted s", "measured s")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for kind in [arguments.kind] if arguments.kind else KINDS:
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(Path(folder), kind)
            predicted, measured = (
                in_own_process(__file__, "--process", what, recipe) for what in ("plan", "learn")
            )
        peaks = predicted["peak"] / 1e9, measured["peak"] / 1e9
        values = (*peaks, peaks[0] / peaks[1], predicted["step"], measured["step"])
        table.add_row(kind, *(f"{value:.2f}" for value in values))
    make_console().print(table)


if __name__ == "__main__":
    main()
