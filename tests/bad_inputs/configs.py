"""Configs that are damaged, describe no model that can be, or another one than the weights are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.random import Generator

from tests.bad_inputs.bad import Bad, all_of, broken_json, json_fields, nested, shown, written

NAN, INFINITY = float("nan"), float("inf")

OF_ALL: dict[str, list[Any]] = {
    "model_type": [..., None, 5, ["bert"], "", "brt", "../bert", "vit", "gpt2", {}],
    "num_attention_heads": [..., 0, -2, 3, 64, 10**12, 2.5, "x", None, [2], NAN, {}],
    "num_hidden_layers": [0, -1, 1, 3, 10**9, 10**30, "x", 2.5, None, [2], True],
    "hidden_size": [0, -32, 31, 64, 10**9, 10**30, "x", 32.5, None],
    "intermediate_size": [0, -64, 63, 10**12, "x", None],
    "hidden_act": ["glue", "", 5, None, ["gelu"], "os.system"],
}
"""Fields and values that no model of the weights can have, given to base and experts alike."""

OF_BERT: dict[str, list[Any]] = {
    "vocab_size": [0, -1, 204, 206, 10**12, "x", None],
    "max_position_embeddings": [0, -1, 31, 10**12, "x", None],
    "type_vocab_size": [0, -2, 3, 10**12, "x"],
    "layer_norm_eps": [NAN, INFINITY, -1.0, "x", None, []],
    "position_embedding_type": ["relative_key", "relative_key_query", "rotary"],
    "is_decoder": [True],
}

OF_LLAMA: dict[str, list[Any]] = {
    "num_key_value_heads": [0, -2, 3, 8, 10**12, "x"],
    "head_dim": [0, -8, 7, 16, 10**12, "x"],
    "rms_norm_eps": [NAN, INFINITY, -1.0, "x", None],
    "vocab_size": [0, -1, 100, 10**12, "x"],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": NAN},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "unheard", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": "x"},
        "default",
        [1],
    ],
    "tie_word_embeddings": [True],
}

OF_VIT: dict[str, list[Any]] = {
    "image_size": [0, -16, 8, 17, 10**9, "x", None],
    "patch_size": [0, -8, 4, 7, 10**9, "x", None],
    "num_channels": [0, -3, 1, 4, 10**9, "x"],
    "layer_norm_eps": [NAN, -1.0, "x"],
}

OF_AN_EXPERT: dict[str, list[Any]] = {
    "num_attention_heads": [4, 1],
    "hidden_act": ["relu"],
    "model_type": ["roberta"],
    "vocab_size": [210],
    "problem_type": ["regression", "multi_label_classification", "x", 5],
    "id2label": [
        {"0": "score"},
        {str(n): f"LABEL_{n}" for n in range(9)},
        {"x": "LABEL_0", "y": "LABEL_1", "z": "LABEL_2"},
        ["a", "b", "c"],
        "abc",
        5,
    ],
}
"""Fields of an expert that contradict its base or its head."""


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad configs: of base and experts alike, and of one of them."""
    for suite, models, fields in (
        ("text", ("base", "alpha", "beta"), OF_ALL | OF_BERT),
        ("language", ("base",), OF_ALL | OF_LLAMA),
        ("images", ("base", "shape", "colour"), OF_ALL | OF_VIT),
    ):
        for field, values in fields.items():
            # The same reader reads the fields that all have: once is enough for most values.
            chosen = values if field not in OF_ALL or suite == "text" else values[:4]
            for number, value in enumerate(chosen):
                name = f"{suite}-{field}-{number}-{shown(value)}"
                yield Bad(name, _everywhere(models, field, value), suite)
    for field, values in OF_AN_EXPERT.items():
        for number, value in enumerate(values):
            damage = json_fields("alpha/config.json", **{field: value})
            yield Bad(f"expert-{field}-{number}-{shown(value)}", damage)
    for number in (10**9, 10**15, 0, -1, 1, "x", 2.5, NAN):
        fields = {"num_labels": number, "id2label": ..., "label2id": ...}
        yield Bad(f"expert-num_labels-{number}", json_fields("alpha/config.json", **fields))
    for model in ("base", "alpha"):
        file = f"{model}/config.json"
        text = (suites["text"] / file).read_text()
        for name, content in broken_json(text, generator, 6 if model == "alpha" else 2):
            if name not in ("huge-number",):
                yield Bad(f"{model}-{name}", written(file, content))
        yield Bad(f"{model}-absent", lambda root, file=file: (root / file).unlink())
        yield Bad(f"{model}-no-fields", written(file, "{}"))
    deep = json.loads(text) | {"id2label": ...}
    deep = json.dumps({name: value for name, value in deep.items() if value is not ...})
    yield Bad("deep-labels", written("alpha/config.json", f'{{"id2label": {nested()},{deep[1:]}'))


def _everywhere(models: tuple[str, ...], field: str, value: Any) -> Callable[[Path], None]:
    return all_of(*(json_fields(f"{model}/config.json", **{field: value}) for model in models))
