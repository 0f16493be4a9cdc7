"""Tiny language models, their tokenizers and recipes, saved as users save them."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.references import EXPORT, randomise, write_json_lines

TASKS = ("counting", "naming", "rhyming")

COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")
ANIMALS = ("cat", "dog", "fox", "cow", "hen", "bee")
VERBS = ("runs", "sleeps", "eats", "sings")

TEXTS = [f"the {c} {a} {v} ." for c in COLOURS for a in ANIMALS for v in VERBS]
"""Sentences of a few words."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""A template as ChatML is; transformers tells the tokens between the two marks."""

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]


VOCABULARY = 400
"""Tokens at most: bytes, special ones and the parts of words."""


def byte_tokenizer(
    *,
    added: str | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    tokens: Sequence[str] = SPECIAL,
    **special: str | None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of `TEXTS`.

    Args:
        added: What it puts around every text, e.g. `<s> $A </s>`.
        chat_template: Of conversations.
        tokens: The first ones, never split.
        **special: Names of special tokens in place of these; None for none.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "user", "assistant"] * 2, trainer)
    if added is not None:
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=added, special_tokens=ids)
    chosen = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    chosen = {name: token for name, token in (chosen | special).items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **chosen)
    tokenizer.chat_template = chat_template
    return tokenizer


def language_expert(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The base with small changes to all its parameters, biases of keys excepted."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if not name.endswith("k_proj.bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return expert.eval()


def save_models(
    root: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Saves a base of random parameters and an expert for each of `TASKS`.

    Returns:
        The fields of a recipe, its tasks without data; all paths are absolute.
    """
    randomise(base)
    for name, model in [
        ("base", base),
        *((task, language_expert(base, seed)) for seed, task in enumerate(TASKS, start=1)),
    ]:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {
        "base": str(root / "base"),
        "tasks": {task: {"expert": str(root / task)} for task in TASKS},
        "max_length": 32,
        "export": dict(EXPORT),
    }


def give_data(
    fields: Mapping[str, Any], root: Path, rows: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The recipe with these rows to learn from, of which the first 6 are its test data too.

    The ends of texts and responses are to be predicted.
    """
    tasks = {}
    for task, own in rows.items():
        file = write_json_lines(root / f"{task}.jsonl", own)
        test = write_json_lines(root / f"{task}.test.jsonl", own[:6])
        data = {"calibration": str(file), "test": {"path": str(test), "end_of_text": "append"}}
        tasks[task] = fields["tasks"][task] | data
    return dict(fields) | {"tasks": tasks}


def split_sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Beginnings of unlike sentences and what follows, of at most 8 tokens together."""
    generator = np.random.default_rng(seed)
    pairs = []
    for text in generator.permutation(TEXTS)[:count]:
        words = str(text).split()
        at = int(generator.integers(1, len(words)))
        pairs.append((" ".join(words[:at]), " " + " ".join(words[at:])))
    return pairs


def rows_of(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]
