"""The text of a recipe, with comments for whoever changes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from adamerge_jax.drafting.kinds import Kind
from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS

_PARTS = {
    "calibration": "examples to learn from, without labels",
    "validation": "choose the one coefficient of task arithmetic, with which the table compares",
    "test": "for the table of results",
}
"""The parts of a task's data in their order, and the line above the first of each."""

_TEXT_LENGTHS = (128, 256, 512, 1024)
"""Values of max_length; a longer one is its user's choice, as memory grows with it."""

_BEHIND = 44
"""Column in which comments behind options begin."""


class Part(NamedTuple):
    """The data of one part of a task as the recipe has it.

    Attributes:
        value: A path, or the fields of a section.
        comment: A comment behind it, or "".
        is_comment: True to write all of it as a comment.
    """

    value: Any
    comment: str = ""
    is_comment: bool = False


class TaskText(NamedTuple):
    """A task as the recipe has it.

    Attributes:
        task: Its name.
        expert: The path of its expert.
        parts: Its data by part.
    """

    task: str
    expert: str
    parts: Mapping[str, Part] = {}


def recipe_text(
    base: str,
    tasks: Sequence[TaskText],
    *,
    kinds: Mapping[str, Kind],
    kinds_in_words: str,
    language: bool,
    tokenizer: str | None,
    tokens: int,
    reason: str | None,
    name: str,
    schema: str | None,
    start: str | None = None,
    dtype: str | None = None,
) -> str:
    """Returns a recipe as YAML.

    Args:
        base: The base's path.
        tasks: The tasks.
        kinds: The kind of each expert; empty if they can only be merged without learning.
        kinds_in_words: The kinds in words.
        language: True for language models.
        tokenizer: The model whose tokenizer the merge is to take; None to name none.
        tokens: The number of tokens that nearly all examples have at most, about.
        reason: In words, why nothing can be learned; None if it can.
        name: The name of the recipe's file.
        schema: The file of the recipe's schema; None to name none.
        start: The mergekit file whose weights learning starts from; None for the preset's start.
        dtype: The dtype of the merge; None for the base's.
    """
    typed = shlex.quote(name)
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines.append(f"# {len(tasks)} expert{'s' * (len(tasks) > 1)} of one base: {kinds_in_words}.")
    if not kinds:
        lines += [
            f"# Nothing can be learned: {reason}",
            f"#   adamerge merge {typed} --method ties --out merged",
        ]
    else:
        lines += [
            f"#   adamerge plan {typed}      # memory, time and disk",
            f"#   adamerge learn {typed}     # to runs/{PurePath(name).stem}",
        ]
    lines += [f"base: {_flow(base)}", "tasks:"]
    told: set[str] = set()
    for task in tasks:
        lines += [f"  {_flow(task.task)}:", f"    expert: {_flow(task.expert)}"]
        lines += _part_lines(task.parts, kinds[task.task], told) if kinds else []
    if tokenizer is not None:
        lines.append(
            f"tokenizer: {_flow(tokenizer)}  # the others' special tokens or template differ"
        )
    if start is not None:
        coefficients = f"coefficients: {_flow({'start': start})}"
        lines.append(_behind(coefficients, "the weights in that file"))
    if dtype is not None:
        lines.append(f"export: {_flow({'dtype': dtype})}")
    lines += _options(list(kinds.values()), language, tokens)
    return "\n".join(lines) + "\n"


def _part_lines(parts: Mapping[str, Part], kind: Kind, told: set[str]) -> Iterator[str]:
    """Yields the lines of a task's data; a part is explained where it comes first."""
    if "calibration" not in parts:
        yield f"    # calibration: DATA  # {kind.example}"
    for part, explanation in _PARTS.items():
        if part not in parts:
            continue
        value, comment, is_comment = parts[part]
        if part not in told:
            yield f"    # {explanation}"
        told.add(part)
        mark = "# " * is_comment
        yield f"    {mark}{part}: {_flow(value)}" + (f"  # {comment}" if comment else "")


def _options(kinds: Sequence[Kind], language: bool, tokens: int) -> Iterator[str]:
    """Yields the options that matter: those that the kinds need, and the others as comments."""
    if not kinds:
        yield ""
        yield from _comments({"export": ({"dtype": "bfloat16"}, "by default that of the base")})
        return
    if language:
        yield _behind(
            "objectives: [{name: logit_alignment, options: {top_tokens: 64}}]",
            "the experts' 64 likeliest tokens",
        )
    fitting = next((length for length in _TEXT_LENGTHS if length >= tokens), _TEXT_LENGTHS[-1])
    reads_text = any(kind.reads_text for kind in kinds)
    if reads_text and (language or fitting > _TEXT_LENGTHS[0]):
        about = f"tokens; nearly all examples have at most some {tokens}"
        yield _behind(f"max_length: {fitting}", about if tokens else "tokens of the longest text")
    preset: Any = PRESETS[DEFAULT_PRESET]
    yield ""
    yield "# What is worth a try:"
    yield from _comments(
        {
            "preset": (DEFAULT_PRESET, "a published way of learning: adamerging, atlas, ..."),
            "learning": (
                {name: preset["learning"][name] for name in ("steps", "batch_size")},
                "fewer steps are quicker",
            ),
            "coefficients": (
                {"granularity": preset["coefficients"]["granularity"]},
                "parameters that share a coefficient: tensor, layer, ...",
            ),
        }
    )
    if any(kind.has_heads for kind in kinds):
        yield from _comments({"heads": (preset["heads"], "or refitted, scaled, kept")})
    if language:
        yield from _comments(
            {
                "retain": ("general.jsonl", "text on which the merge stays as the base is"),
                "evaluation": ({"exact_match": True}, "models write answers to the test data"),
            }
        )
    yield from _comments(
        {
            "export": ({"dtype": "bfloat16", "adapter": False}, "by default the base's dtype"),
            "seed": (0, ""),
        }
    )


def _comments(options: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    for name, (value, comment) in options.items():
        yield _behind(f"# {name}: {_flow(value)}", comment)


def _behind(text: str, comment: str) -> str:
    return f"{text:<{_BEHIND}}  # {comment}" if comment else text


def _flow(value: Any) -> str:
    """Returns a value as YAML in one line."""

    def dump(*, allow_unicode: bool) -> str:
        text = yaml.dump(
            value,
            Dumper=_OneLineDumper,
            default_flow_style=True,
            width=float("inf"),
            allow_unicode=allow_unicode,
            sort_keys=False,
        )
        return text.removesuffix("...\n").strip()

    text = dump(allow_unicode=True)
    # PyYAML leaves marks of direction as they are.
    return text if text.isprintable() else dump(allow_unicode=False)


class _OneLineDumper(yaml.SafeDumper):
    """Writes texts in one line: in a comment the second one would be a part of the recipe."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quotes a text in which there are ends of lines, so that these are escaped."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_OneLineDumper.add_representer(str, _OneLineDumper.represent_text)
