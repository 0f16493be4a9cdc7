"""LoRA adapters that are damaged, have numbers that are none, or are of another base."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from tests.bad_inputs.bad import (
    Bad,
    all_of,
    broken_json,
    json_fields,
    nested,
    shown,
    tensors,
    written,
)

CONFIG = "code/adapter_config.json"
WEIGHTS = "code/adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
QUERY_A = f"{PREFIX}1.self_attn.q_proj.lora_A.weight"
QUERY_B = f"{PREFIX}1.self_attn.q_proj.lora_B.weight"

NAN, INFINITY = float("nan"), float("inf")

CATASTROPHE = "(.*)*(.*)*(.*)*(a+)+(a+)+(a+)+[^qvud]"

FIELDS: dict[str, list[Any]] = {
    "lora_alpha": [NAN, INFINITY, -INFINITY, 1e39, -1e39, 10**400, "8", "", {}, [], [8]],
    "r": [0, -4, "4", NAN, [], 10**30],
    "alpha_pattern": [
        {"q_proj": NAN},
        {"q_proj": INFINITY},
        {"q_proj": 1e39},
        {"q_proj": "x"},
        {"q_proj": None},
        {"q_proj": [8]},
        {"(": 8},
        {"[": 8},
        {"*": 8},
        {"(?P<a": 8},
        {CATASTROPHE: 8},
        {"(a" * 30_000: 8},
        [1],
        "q_proj",
        5,
    ],
    "rank_pattern": [
        {"(": 4},
        {CATASTROPHE: 4},
        {"q_proj": "x"},
        {"q_proj": -4},
        {"q_proj": 7},
        [1],
        "x",
    ],
    "peft_type": [..., None, "IA3", "LORA2", 5, ["LORA"], {}],
    "use_dora": [True, "yes"],
    "fan_in_fan_out": [True],
    "layer_replication": [[[0, 1]]],
    "init_lora_weights": ["pissa", "olora"],
}
"""Fields and values with which an adapter has no meaning, or none that is supported."""


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad adapters of a language model."""
    for field, values in FIELDS.items():
        for number, value in enumerate(values):
            damage = json_fields(CONFIG, **{field: value})
            yield Bad(f"{field}-{number}-{shown(value)}", damage, "language")
    text = (suites["language"] / CONFIG).read_text()
    for name, content in broken_json(text, generator, 6):
        if name != "huge-number":
            yield Bad(f"config-{name}", written(CONFIG, content), "language")
    yield Bad("config-deep-alpha", written(CONFIG, _with(text, "lora_alpha", nested())), "language")
    yield Bad(
        "config-huge-alpha", written(CONFIG, _with(text, "lora_alpha", "9" * 5000)), "language"
    )
    yield Bad("config-absent", lambda root: (root / CONFIG).unlink(), "language")
    yield Bad("weights-absent", lambda root: (root / WEIGHTS).unlink(), "language")
    content = (suites["language"] / WEIGHTS).read_bytes()
    for place in generator.integers(1, len(content), 4):
        yield Bad(f"weights-cut-{place}", written(WEIGHTS, content[:place]), "language")
    yield Bad("weights-pickled", _pickled, "language")
    for name, edit in _edits():
        yield Bad(name, tensors(WEIGHTS, edit), "language")
    for name, scale in {"alpha": 1e38, "alpha-negative": -1e38}.items():
        # Each number is finite, and their product is not.
        wide = tensors(WEIGHTS, lambda t: t.update({QUERY_B: t[QUERY_B] * 1e20}))
        damage = all_of(wide, json_fields(CONFIG, lora_alpha=scale))
        yield Bad(f"product-over-float32-{name}", damage, "language")


def _edits() -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], object]]]:
    for value in (np.nan, np.inf, -np.inf):
        for tensor in (QUERY_A, QUERY_B):
            yield (
                f"{value}-in-{tensor[-13:]}",
                lambda t, n=tensor, v=value: t[n].__setitem__((1, 2), v),
            )
    yield "over-float32", lambda t: t.update({QUERY_A: np.full((4, 32), 1e300)})
    yield (
        "product-over-float32",
        lambda t: t.update(
            {
                QUERY_A: np.full((4, 32), 1e30, np.float32),
                QUERY_B: np.full((32, 4), 1e30, np.float32),
            }
        ),
    )
    yield "no-tensors", lambda t: t.clear()
    yield (
        "all-empty",
        lambda t: t.update({n: a[:0] if "_A" in n else a[:, :0] for n, a in t.items()}),
    )
    yield "rank-0", lambda t: t.update({QUERY_A: t[QUERY_A][:0], QUERY_B: t[QUERY_B][:, :0].copy()})
    yield "without-a", lambda t: t.pop(QUERY_A)
    yield "without-b", lambda t: t.pop(QUERY_B)
    yield "ranks-differ", lambda t: t.update({QUERY_A: t[QUERY_A][:2]})
    yield "integers", lambda t: t.update({QUERY_A: t[QUERY_A].astype(np.int8)})
    yield "flat", lambda t: t.update({QUERY_A: t[QUERY_A].reshape(-1)})
    yield "three-axes", lambda t: t.update({QUERY_A: t[QUERY_A][None]})
    yield "scalar", lambda t: t.update({QUERY_A: np.zeros((), np.float32)})
    yield "wider", lambda t: t.update({QUERY_A: np.zeros((4, 48), np.float32)})
    yield "higher", lambda t: t.update({QUERY_B: np.zeros((48, 4), np.float32)})
    yield "swapped", lambda t: t.update({QUERY_A: t[QUERY_B].copy(), QUERY_B: t[QUERY_A].copy()})
    yield (
        "of-a-third-layer",
        lambda t: t.update(
            {
                n.replace("layers.1", "layers.2"): a.copy()
                for n, a in list(t.items())
                if "layers.1" in n
            }
        ),
    )
    yield (
        "of-another-module",
        lambda t: t.update(
            {n.replace("q_proj", "query"): t.pop(n) for n in list(t) if "q_proj" in n}
        ),
    )
    yield (
        "of-dora",
        lambda t: t.update(
            {QUERY_A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(32, np.float32)}
        ),
    )
    yield (
        "bias-of-nothing",
        lambda t: t.update({f"{PREFIX}0.unheard.bias": np.ones(32, np.float32)}),
    )
    yield (
        "saved-of-another-size",
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((9, 32), np.float32)}),
    )


def _pickled(root: Path) -> None:
    (root / WEIGHTS).rename(root / "code" / "adapter_model.bin")


def _with(text: str, field: str, value: str) -> str:
    """Returns a JSON text with a field whose value is given as JSON."""
    fields = json.loads(text)
    del fields[field]
    return f'{{"{field}": {value}, {json.dumps(fields)[1:]}'
