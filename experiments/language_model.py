"""Merging language models without a network: `python experiments/language_model.py`.

Trains a small Llama on the sources of installed packages, fine-tunes it for each of three domains
that every Python machine has, as whole models and as LoRA adapters of every matrix and table, and
merges both kinds with the recipes that it writes:

- `python`: sources of the standard library,
- `c`: header files of Python and NumPy,
- `readme`: descriptions of the installed packages.

The merge learns what each expert says of the text that it was trained on. Test data are files that
nothing was trained on; scores are losses per token.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackagePath, distributions
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from adamerge_jax.checkpoints.folders import require_new
from adamerge_jax.checkpoints.huggingface_export import save_model
from adamerge_jax.checkpoints.peft_export import AdapterWeights, save_adapter
from adamerge_jax.checkpoints.peft_tensors import Form
from adamerge_jax.cli.console import make_console
from adamerge_jax.cli.main import main as adamerge
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.errors import InputError
from adamerge_jax.mixing import mix
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.parameter_names import is_stacked, tensors_of
from adamerge_jax.task_vectors import LowRankDelta

Parameters = Mapping[str, Array]

GENERAL = "packages"
"""What the base is trained on."""

DOMAINS = ("python", "c", "readme")
KINDS = ("full", "lora")

END = "<|end|>"
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    architectures=["LlamaForCausalLM"],
)
LENGTH = 128
"""Tokens of a sequence."""

CHARACTERS = 1_500_000
"""Of each domain, at most."""

# Small batches: a step of few sequences moves such a model as far as one of many.
BATCH_SIZE = 8
BASE_STEPS, BASE_LEARNING_RATE = 900, 2.5e-3
EXPERT_STEPS, EXPERT_LEARNING_RATE = 200, 1e-3
LORA_RANK, LORA_LEARNING_RATE = 16, 4e-3

# Experts of so small a model change all of it, and the domains need the same weights for different
# things: they are merged in pieces of 1 to 8 entries of a matrix, 32 of a table.
COEFFICIENTS = {"granularity": "chunk", "granularity_options": {"pieces": 12288, "tables": True}}
LEARNING = {
    "steps": 480,
    "batch_size": 2,
    "held_out": 0.05,
    "evaluate_every": 160,
    "optimizer": {"learning_rate": 0.07},
}
SEQUENCES = 960
"""Of each domain, at most, to learn the merge from."""

PARTS = ("test", "validation", *["train"] * 8)
"""Where ten files in a row go."""


class Corpus(NamedTuple):
    """Texts of one domain; no file is in two parts."""

    train: list[str]
    validation: list[str]
    test: list[str]


def main() -> None:
    """Prepares checkpoints, data and recipes, then runs `adamerge learn` on both recipes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("language_model"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of all training")
    arguments = parser.parse_args()
    try:
        require_new(arguments.out)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    prepare(arguments.out, arguments.seed, make_console())
    for kind in KINDS:
        recipe = arguments.out / f"{kind}.yaml"
        adamerge(["learn", str(recipe), "--out", str(arguments.out / f"run-{kind}")])


def prepare(folder: Path, seed: int, console: Console) -> None:
    """Writes `base/`, `full/<domain>/`, `lora/<domain>/`, `data/`, `lm_eval/` and two recipes."""
    corpora = {domain: read_corpus(domain) for domain in (GENERAL, *DOMAINS)}
    for domain, corpus in corpora.items():
        sizes = ", ".join(f"{sum(map(len, part)) / 1e3:.0f}" for part in corpus)
        console.print(f"{domain}: {sizes} thousand characters to {', '.join(Corpus._fields)}")
    # A quarter of the texts is enough for it, and takes a quarter of the time.
    tokenizer = train_tokenizer([text for corpus in corpora.values() for text in corpus.train[::4]])
    tokens = {domain: encode(tokenizer, corpus.train) for domain, corpus in corpora.items()}

    train = make_trainer(lambda frozen, parameters: parameters)
    train_adapter = make_trainer(adapted)
    base = train(
        initial_parameters(seed),
        {},
        [tokens[GENERAL]],
        steps=BASE_STEPS,
        learning_rate=BASE_LEARNING_RATE,
        generator=np.random.default_rng([seed, 1]),
        description="training the base",
    )
    save_model(folder / "base", CONFIG, base)
    tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for number, domain in enumerate(DOMAINS):
        full = train(
            base,
            {},
            [tokens[domain]],
            steps=EXPERT_STEPS,
            learning_rate=EXPERT_LEARNING_RATE,
            generator=np.random.default_rng([seed, 2, number]),
            description=f"training {domain}",
        )
        save_model(folder / "full" / domain, CONFIG, full)
        factors = train_adapter(
            initial_factors(base, seed),
            base,
            [tokens[domain]],
            steps=EXPERT_STEPS,
            learning_rate=LORA_LEARNING_RATE,
            generator=np.random.default_rng([seed, 3, number]),
            description=f"training {domain} (LoRA)",
        )
        save_adapter(
            folder / "lora" / domain, modules_of(factors), base="base", task_type="CAUSAL_LM"
        )
        for part in Corpus._fields:
            rows = [json.dumps({"text": text}) for text in getattr(corpora[domain], part)]
            (folder / "data" / f"{domain}.{part}.jsonl").write_text("\n".join(rows) + "\n")
    for kind in KINDS:
        file = folder / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(recipe(kind, seed), sort_keys=False))
    (folder / "lm_eval").mkdir()
    for domain in DOMAINS:
        task = yaml.safe_dump(harness_task(domain, folder), sort_keys=False)
        (folder / "lm_eval" / f"{domain}.yaml").write_text(task)
    console.print(f"base, experts, data and recipes are in {folder}/")


def recipe(kind: str, seed: int) -> dict:
    """The recipe of a merge of whole experts, or of adapters."""

    def source(domain: str, part: str, limit: int) -> dict:
        # The experts were trained on texts with their end.
        fields = {"packed": True, "end_of_text": "append", "limit": limit}
        return {"path": f"data/{domain}.{part}.jsonl", **fields}

    return {
        "name": f"language model ({kind})",
        "base": "base",
        "tasks": {
            domain: {
                "expert": f"{kind}/{domain}",
                "calibration": source(domain, "train", SEQUENCES),
                "validation": source(domain, "validation", 16),
                "test": source(domain, "test", 96),
            }
            for domain in DOMAINS
        },
        "coefficients": COEFFICIENTS,
        "objectives": [{"name": "logit_alignment", "options": {"top_tokens": 64}}],
        "learning": LEARNING,
        "evaluation": {"batch_size": 16},
        "max_length": LENGTH,
        "seed": seed,
    }


def harness_task(domain: str, folder: Path) -> dict:
    """The domain's test files as a task of EleutherAI's harness: bits per byte of whole files."""
    return {
        "task": f"held_out_{domain}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data" / f"{domain}.test.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def read_corpus(domain: str) -> Corpus:
    """The files of a domain: of ten one to test, one to validate, eight to train.

    A paragraph that an earlier file had is left out: headers repeat each other.
    """
    seen: set[str] = set()
    parts: dict[str, list[str]] = {part: [] for part in Corpus._fields}
    size, number = 0, 0
    for text in files_of(domain):
        paragraphs = [p for p in text.split("\n\n") if p.strip() and p.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        text = "\n\n".join(paragraphs)
        if len(text) < 200:
            continue
        text = text[: CHARACTERS // 20]
        part = PARTS[number % len(PARTS)]
        parts[part].append(text)
        size, number = size + len(text), number + 1
        if size > CHARACTERS:
            break
    return Corpus(**parts)


def files_of(domain: str) -> Iterator[str]:
    """The texts of a domain, in an order that depends on their contents alone."""
    paths = {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "include")}
    if domain == "python":
        found = paths["stdlib"].rglob("*.py")
        files = [f for f in found if not {"site-packages", "test", "pydoc_data"} & set(f.parts)]
        texts = map(read, files)
    elif domain == GENERAL:
        files = installed(lambda file: file.suffix == ".py" and "test" not in str(file))
        texts = map(read, sorted(files)[:: max(1, len(files) // 1000)])
    elif domain == "c":
        files = [*paths["include"].rglob("*.h"), *Path(np.get_include()).rglob("*.h")]
        texts = map(read, files)
    else:
        texts = [d.metadata.get_payload() for d in distributions() if d.metadata is not None]
    return iter(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()))


def installed(chosen: Callable[[PackagePath], bool]) -> list[Path]:
    """Files of installed packages."""
    return [
        Path(file.locate())
        for distribution in distributions()
        for file in distribution.files or ()
        if chosen(file) and Path(file.locate()).is_file()
    ]


def read(file: Path) -> str:
    """A file's text; what is no UTF-8 is left out."""
    return file.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Int[np.ndarray, " N"]:
    """All texts as one row of tokens, each with the token that ends it."""
    rows = tokenizer([text + END for text in texts])["input_ids"]
    return np.concatenate([np.array(row, np.int32) for row in rows])


def initial_parameters(seed: int) -> dict[str, Array]:
    """Random weights by name, `*` where layers are stacked."""
    generator = np.random.default_rng([seed, 0])
    shapes = family_of(CONFIG).build_backbone(CONFIG).shapes
    return {
        name: jnp.ones(leaf.shape)
        if "norm" in name
        else jnp.asarray(generator.normal(0, 0.02, leaf.shape), jnp.float32)
        for name, leaf in shapes.items()
    }


def initial_factors(base: Parameters, seed: int) -> dict[str, dict[str, Array]]:
    """A random A and a zero B for every matrix and table: `[L, r, n]` and `[L, m, r]`, or no L."""
    generator = np.random.default_rng([seed, 4])
    factors = {}
    for name, array in base.items():
        if "norm" not in name:
            *layers, m, n = array.shape
            a = generator.normal(0, n**-0.5, (*layers, LORA_RANK, n))
            factors[name] = {
                "a": jnp.asarray(a, jnp.float32),
                "b": jnp.zeros((*layers, m, LORA_RANK)),
            }
    return factors


def adapted(base: Parameters, factors: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """The base with lazy `B A` on its matrices: an adapter is a delta with coefficient 1."""
    deltas = {
        name: LowRankDelta(own["b"][..., None, :, :], own["a"][..., None, :, :])
        for name, own in factors.items()
    }
    shapes = {name: base[name].shape for name in deltas}
    whole = make_granularity("tensor", {}, shapes)
    return mix(base, deltas, whole.scales(whole.init(constant(shapes, 1, 1.0))))


def modules_of(factors: Mapping[str, Mapping[str, Array]]) -> dict[str, AdapterWeights]:
    """The factors by the names of the modules that they belong to."""
    modules = {}
    for name, own in factors.items():
        a, b = np.asarray(own["a"]), np.asarray(own["b"])
        tensors = tensors_of(name, a.shape)
        if not is_stacked(name):
            a, b = a[None], b[None]
        for tensor, its_a, its_b in zip(tensors, a, b, strict=True):
            module = tensor.removesuffix(".weight")
            form: Form = "embedding" if "embed" in module else "linear"
            modules[module] = AdapterWeights(its_a, its_b, form)
    return modules


def make_trainer(
    parameters_of: Callable[[Parameters, dict], Parameters],
) -> Callable[..., dict]:
    """A function that trains; its step is compiled once.

    Args:
        parameters_of: From what stays as it is and what is trained to the model's parameters.
    """
    family = family_of(CONFIG)
    backbone, head = family.build_backbone(CONFIG, "elementwise"), family.build_head(CONFIG)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def loss(trained: dict, frozen: Parameters, ids: Int[Array, "B T+1"]) -> Float[Array, ""]:
        parameters = parameters_of(frozen, trained)
        outputs = backbone(parameters, {"input_ids": ids[:, :-1]})
        logits = head(complete_head(head, {}, parameters), outputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @jax.jit
    def step(trained, state, frozen, ids, rate):
        updates, state = optimizer.update(jax.grad(loss)(trained, frozen, ids), state)
        return jax.tree.map(lambda old, update: old - rate * update, trained, updates), state

    def train(
        trained: dict,
        frozen: Parameters,
        tokens: list[Int[np.ndarray, " N"]],
        *,
        steps: int,
        learning_rate: float,
        generator: np.random.Generator,
        description: str,
    ) -> dict:
        """Trains on sequences drawn from rows of tokens, from each row as many.

        Args:
            trained: What is trained, any pytree.
            frozen: What stays as it is.
            tokens: Rows of tokens.
            steps: Number of steps.
            learning_rate: At its highest.
            generator: Draws the sequences.
            description: Of the progress bar.
        """
        schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
        state = optimizer.init(trained)
        for rate in track(np.asarray(schedule(np.arange(steps))), description=description):
            rows = [tokens[row] for row in generator.integers(0, len(tokens), BATCH_SIZE)]
            starts = [generator.integers(0, len(row) - LENGTH - 1) for row in rows]
            pairs = zip(rows, starts, strict=True)
            ids = np.stack([row[start : start + LENGTH + 1] for row, start in pairs])
            trained, state = step(trained, state, frozen, ids, rate)
        return trained

    return train


if __name__ == "__main__":
    main()
