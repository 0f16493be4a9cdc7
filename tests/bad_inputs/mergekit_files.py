"""Files of mergekit that learning cannot start from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from numpy.random import Generator

from tests.bad_inputs.bad import DEEP, Bad, recipe_field, shown
from tests.bad_inputs.suites import replace

FILE = "merge.yaml"

NAN, INFINITY = float("nan"), float("inf")

WEIGHTS: tuple[Any, ...] = (
    NAN,
    INFINITY,
    -INFINITY,
    1e39,
    -1e39,
    10**400,
    "word",
    "",
    None,
    {},
    [],
    [None],
    ["x"],
    [0.5, "x"],
    [NAN, 0.5],
    [0.5, INFINITY],
    [1e39, 0.5],
    {"value": 0.5},
    [{"filter": "query"}],
    [{"filter": 5, "value": 0.5}],
    [{"filter": "query", "value": 0.5}],
    [{"value": "x"}],
    [{"value": NAN}],
    [{"value": [0.5, NAN]}],
    [{"filter": "query", "value": 0.5}, 0.5],
    "nan",
    "1e400",
    "0x10",
    [[0.5]],
    [10**400, 1],
)


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad mergekit files of a recipe that starts from one."""
    for number, weight in enumerate(WEIGHTS):
        yield Bad(f"weight-{number}-{shown(weight)}", _fields(weight))
        if number % 3 == 0:
            yield Bad(
                f"weight-of-all-{number}", _fields(0.4, beta=..., parameters={"weight": weight})
            )
    for name, changes in {
        "method-unknown": {"merge_method": "dare_ties"},
        "method-missing": {"merge_method": ...},
        "method-number": {"merge_method": 5},
        "method-list": {"merge_method": ["linear"]},
        "method-linear-of-nothing": {"merge_method": "linear", "models": []},
        "base-missing": {"base_model": ...},
        "base-another": {"base_model": "alpha"},
        "base-number": {"base_model": 5},
        "base-list": {"base_model": ["base"]},
        "base-long": {"base_model": "x" * 300},
        "base-nul": {"base_model": "a\0b"},
        "models-missing": {"models": ...},
        "models-null": {"models": None},
        "models-fields": {"models": {"model": "alpha"}},
        "models-words": {"models": ["alpha", "beta"]},
        "models-empty": {"models": []},
        "models-nested": {"models": [["alpha"], ["beta"]]},
        "slices": {
            "models": ...,
            "slices": [{"sources": [{"model": "alpha", "layer_range": [0, 2]}]}],
        },
        "parameters-list": {"parameters": [1]},
        "parameters-word": {"parameters": "weight"},
        "lambda-nan": {"parameters": {"lambda": NAN}},
        "lambda-1e39": {"parameters": {"lambda": 1e39}},
        "lambda-word": {"parameters": {"lambda": "x"}},
        "lambda-list": {"parameters": {"lambda": []}},
        "lambda-product": {"parameters": {"lambda": 1e38}, "weight": 1e38},
        "normalize-word": {"parameters": {"normalize": "word"}},
        "linear-sum-0": {"merge_method": "linear", "weight": -0.4},
        "linear-unnormalized": {"merge_method": "linear", "parameters": {"normalize": False}},
    }.items():
        yield Bad(name, _fields(changes.pop("weight", 0.5), **changes))
    for name, model in {
        "unknown": "gamma",
        "number": 5,
        "null": None,
        "list": ["beta"],
        "twice": "alpha",
        "lora": "beta+x",
        "long": "x" * 5000,
        "nul": "a\0b",
        "fields": {"model": {}},
        "absent": "../beta",
        "with-lora": {"model": "beta", "lora": "x"},
        "empty": "",
    }.items():
        yield Bad(f"model-{name}", _fields(0.5, beta=model))
    text = yaml.safe_dump(_healthy(0.5))
    for name, content in {
        "empty": "",
        "word": "word",
        "list": "- a",
        "number": "5",
        "not-utf-8": text.encode() + b"\xff\xfe",
        "nul": text.encode() + b"a: b\0",
        "open": text + "x: [",
        "tab": "\t" + text,
        "tag": text + "x: !u v",
        "code": text + "x: !!python/object/apply:os.system ['true']",
        "deep": "[" * DEEP,
        "deep-field": f"{text}x: {'[' * DEEP}{']' * DEEP}",
        "recursive": "&a {models: [*a], merge_method: linear}",
        "deep-weight": text.replace("weight: 0.5", f"weight: {'[' * 3000}{']' * 3000}"),
        "huge-number": text.replace("weight: 0.5", f"weight: {'9' * 5000}"),
        "huge-hexadecimal": text.replace("weight: 0.5", f"weight: 0x{'f' * 5000}"),
        "laughs": "".join(
            f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10) if n else 'x'}]\n" for n in range(12)
        )
        + text.replace("weight: 0.5", "weight: *a11"),
        "duplicate-weight": text.replace("weight: 0.5", "weight: 0.1\n    weight: 0.5"),
        "duplicate-models": f"{text}models: []\n",
        "html": "<!DOCTYPE html>",
        "zeros": bytes(900),
        "random": generator.bytes(900),
    }.items():
        yield Bad(f"text-{name}", _start(content))
    yield Bad("absent", recipe_field("coefficients.start", FILE))
    yield Bad(
        "folder",
        lambda root: [(root / FILE).mkdir(), recipe_field("coefficients.start", FILE)(root)],
    )


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields the files that the bad ones are made of."""
    yield Bad("weight", _fields(0.5))
    yield Bad("weights-by-depth", _fields([0.1, 0.5]))
    yield Bad("weight-of-all", _fields(0.4, beta=..., parameters={"weight": 0.5}))


def _healthy(weight: Any, beta: Any = "beta", **changes: Any) -> dict[str, Any]:
    of_beta = (
        {"model": "beta"} if beta is ... else {"model": beta, "parameters": {"weight": weight}}
    )
    fields = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "alpha", "parameters": {"weight": 0.4}}, of_beta],
        "dtype": "float32",
    } | changes
    return {field: value for field, value in fields.items() if value is not ...}


def _fields(weight: Any, beta: Any = "beta", **changes: Any) -> Callable[[Path], None]:
    return _start(yaml.safe_dump(_healthy(weight, beta, **changes), sort_keys=False))


def _start(content: bytes | str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        replace(root / FILE, content)
        recipe_field("coefficients.start", FILE)(root)

    return damage
