"""Tokenizers that are damaged, of another vocabulary, or cannot pad; chat templates that fail."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.random import Generator

from tests.bad_inputs.bad import Bad, all_of, broken_json, json_fields, nested, written
from tests.bad_inputs.suites import WORDS, replace
from tests.references import write_json_lines

CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"

TEMPLATES = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 1 %}{% endfor %}"
    "{% endfor %}{{ messages }}",
    "endless-macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless-text": "{{ 'x' * 10 ** 12 }}",
    "endless-power": "{{ 9 ** 9 ** 9 }}",
    "endless-filter": "{{ range(10 ** 9) | list | length }}",
    "endless-join": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "not-closed": "{% for message in messages %}{{ message['content'] }}",
    "unknown-filter": "{{ messages | unheard }}",
    "unknown-function": "{{ os.system('true') }}",
    "unknown-test": "{% if messages is unheard %}{% endif %}",
    "attack": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raises": "{{ raise_exception('no system prompts') }}",
    "divides": "{{ 1 / 0 }}",
    "another-key": "{% for m in messages %}{{ m['text'].strip() }}{% endfor %}",
    "includes": "{% include '/etc/passwd' %}",
    "nothing": "",
    "number": "{{ messages[99]['content'] }}",
}
"""Templates by the reason that they cannot write the conversations below."""


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad tokenizers of all models alike, and of one expert."""
    everywhere = ("base", "alpha", "beta")
    whole = json.loads((suites["text"] / "base" / TOKENIZER).read_text())
    for name, content in broken_json(json.dumps(whole), generator, 4):
        if name not in ("huge-number", "deep-field", "lone-surrogate-half"):
            yield Bad(f"tokenizer-{name}", _in(everywhere, TOKENIZER, content))
    text = (suites["text"] / "base" / CONFIG).read_text()
    for name, content in broken_json(text, generator, 3):
        if name not in ("huge-number", "deep-field", "lone-surrogate-half"):
            yield Bad(f"config-{name}", _in(everywhere, CONFIG, content))
    for name, fields in {
        "no-model": {"model": ...},
        "model-null": {"model": None},
        "model-unknown": {"model": {"type": "Unheard"}},
        "vocabulary-empty": {"model": whole["model"] | {"vocab": {}}},
        "vocabulary-list": {"model": whole["model"] | {"vocab": ["a"]}},
        "ids-negative": {"model": whole["model"] | {"vocab": {"w1": -1, "[UNK]": 0}}},
        "ids-text": {"model": whole["model"] | {"vocab": {"w1": "x"}}},
        "ids-over-the-table": {"model": whole["model"] | {"vocab": _shifted(whole, 5000)}},
        "ids-of-2^31": {"model": whole["model"] | {"vocab": _shifted(whole, 2**31)}},
        "normalizer-unknown": {"normalizer": {"type": "Unheard"}},
        "pre-tokenizer-number": {"pre_tokenizer": 5},
        "post-processor-unknown": {"post_processor": {"type": "Unheard"}},
        "regex-invalid": {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "letters-of-letters": {"normalizer": _rules(4, 1000)},
        "letters-of-bytes": {"pre_tokenizer": _bytes_of_bytes(40)},
        "text-many-times": {"post_processor": _repeating(whole["post_processor"], 1000)},
        "no-text": {"post_processor": _repeating(whole["post_processor"], 0)},
        "drawn": {
            "model": {"type": "BPE", "dropout": 0.5, "merges": []}
            | {"vocab": whole["model"]["vocab"], "unk_token": "[UNK]"}
        },
        "added-tokens-number": {"added_tokens": 5},
        "added-tokens-lists": {"added_tokens": [[1]]},
        "deep": {"normalizer": _sequence(20_000)},
        "cuts-all": {"truncation": {"max_length": -1}},
    }.items():
        yield Bad(f"tokenizer-{name}", _fields(everywhere, TOKENIZER, fields))
    for name, fields in {
        "padding-number": {"pad_token": 5},
        "padding-list": {"pad_token": ["[PAD]"]},
        "longest-0": {"model_max_length": 0},
        "longest-1": {"model_max_length": 1},
        "longest-negative": {"model_max_length": -5},
        "longest-text": {"model_max_length": "x"},
        "longest-list": {"model_max_length": [16]},
        "longest-nan": {"model_max_length": float("nan")},
        "class-number": {"tokenizer_class": 5},
    }.items():
        yield Bad(f"config-{name}", _fields(everywhere, CONFIG, fields))
    vocabulary = whole["model"]["vocab"]
    swapped = vocabulary | {"w3": vocabulary["w4"], "w4": vocabulary["w3"]}
    shorter = {token: number for token, number in vocabulary.items() if number < 100}
    for name, other in {
        "swapped": swapped,
        "shorter": shorter,
        "shifted": _shifted(whole, 1),
    }.items():
        fields = {"model": whole["model"] | {"vocab": other}}
        yield Bad(f"expert-{name}", _fields(("alpha",), TOKENIZER, fields))
    yield Bad("file-over-the-memory", _sparse(f"base/{TOKENIZER}"))
    yield Bad("config-over-the-memory", _sparse(f"base/{CONFIG}"))
    yield Bad("expert-unknown-token", _fields(("alpha",), CONFIG, {"unk_token": "w1"}))
    yield Bad("expert-cut", written(f"beta/{TOKENIZER}", json.dumps(whole)[:3000]))
    yield Bad("expert-deep", written(f"beta/{CONFIG}", nested()))
    yield Bad(
        "none",
        lambda root: [
            (root / model / file).unlink() for model in everywhere for file in (TOKENIZER, CONFIG)
        ],
    )
    for name, template in TEMPLATES.items():
        yield Bad(f"template-{name}", _template(template), "language")
    # A template may also stand in the tokenizer's config.
    for name in ("endless", "not-closed", "unknown-filter"):
        in_config = json_fields(f"base/{CONFIG}", chat_template=TEMPLATES[name])
        damage = all_of(_conversations, _without_template, in_config)
        yield Bad(f"template-in-config-{name}", damage, "language")


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields the conversations that the templates are for, with one that can write them."""
    yield Bad("conversations", _conversations, "language")
    # Rules that find nothing of what others wrote, of which tokenizers have long lists.
    rules = [_rule(chr(0x2000 + number), "...") for number in range(50)]
    fields = {"normalizer": {"type": "Sequence", "normalizers": rules}}
    yield Bad("many-rules", _fields(("base", "alpha", "beta"), TOKENIZER, fields))


def _in(models: tuple[str, ...], file: str, content: bytes | str) -> Callable[[Path], None]:
    return all_of(*(written(f"{model}/{file}", content) for model in models))


def _fields(models: tuple[str, ...], file: str, fields: dict[str, Any]) -> Callable[[Path], None]:
    return all_of(*(json_fields(f"{model}/{file}", **fields) for model in models))


def _shifted(tokenizer: dict[str, Any], step: int) -> dict[str, int]:
    """Returns a vocabulary whose words, but not its special tokens, have other ids."""
    vocabulary = tokenizer["model"]["vocab"]
    return {t: n + step if t in WORDS else n for t, n in vocabulary.items()}


def _rule(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def _rules(count: int, times: int) -> dict[str, Any]:
    """Returns rules that each write a letter many times."""
    return {"type": "Sequence", "normalizers": [_rule("w", "w" * times)] * count}


def _bytes_of_bytes(count: int) -> dict[str, Any]:
    """Returns steps that each write the bytes of all letters as letters."""
    step = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [step] * count}


def _repeating(template: dict[str, Any], times: int) -> dict[str, Any]:
    """Returns a template of special tokens in which a text stands so many times."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    parts = [part for part in template["single"] if "Sequence" not in part]
    return template | {"single": [*parts, *[text] * times]}


def _sparse(name: str) -> Callable[[Path], None]:
    """Returns the damage of a file that has more bytes than a memory, and takes no disk."""

    def damage(root: Path) -> None:
        replace(root / name, "")
        with (root / name).open("wb") as stream:
            stream.truncate(2**40)

    return damage


def _sequence(depth: int) -> dict[str, Any]:
    normalizer: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(200):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return normalizer | {"normalizers": normalizer["normalizers"] * (depth // 200) + [{"type": 1}]}


def _template(template: str) -> Callable[[Path], None]:
    return all_of(_conversations, written("base/chat_template.jinja", template))


def _conversations(root: Path) -> None:
    """Makes conversations of the calibration data."""
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    for task in ("code", "law"):
        for part in ("cal", "test"):
            replace(root / f"{task}.{part}.jsonl", "")
            write_json_lines(root / f"{task}.{part}.jsonl", [{"messages": turns}] * 12)


def _without_template(root: Path) -> None:
    (root / "base" / "chat_template.jinja").unlink()
