"""The page of `any_model.py`: sums by modality, and every type that is not whole."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]

GROUPS = ("text", "image", "image-text", "other")

COMMAND = "python experiments/benchmarks/any_model.py --out any_model.jsonl --page FILE"


def in_words(result: Result) -> str:
    """Returns the outcome of one type."""
    if not result.get("made"):
        return f"not made: {result.get('reason', '')}"
    if result["folds"] != "equal":
        return f"does not fold: {result['folds']}"
    if result["learns"] != "equal":
        return f"does not learn: {result['learns']}"
    return f"equal by {result['way']}, {result['difference']:.0e}, {result['compile']} s"


def group_of(result: Result) -> str:
    """Returns the group of the kinds of data that a type reads."""
    kinds = set(result.get("modalities", ()))
    if "text" in kinds and kinds & {"image", "video"} and kinds <= {"text", "image", "video"}:
        return "image-text"
    return next((kind for kind in ("text", "image") if kinds == {kind}), "other")


def page(results: Sequence[Result]) -> list[str]:
    """Returns the lines of the page."""
    import torch
    import transformers

    return [
        "# Every model type",
        "",
        f"A tiny random model of each of the {len(results)} types of `transformers` "
        f"{transformers.__version__} (PyTorch {torch.__version__}), made by",
        "",
        f"    {COMMAND}",
        "",
        *summary(results),
    ]


def summary(results: Sequence[Result]) -> list[str]:
    """Returns a Markdown table with a line a group."""
    columns = "types", "made", "fold", "learn: own", "bridge", "whole", "learn", "do not"
    lines = [f"| reads | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for group in (*GROUPS, "all"):
        of_group = [r for r in results if group in ("all", group_of(r))]
        made = [r for r in of_group if r.get("made")]
        learned = [r for r in made if r.get("learns") == "equal"]
        ways = [sum(r["way"] == way for r in learned) for way in ("own", "bridge", "whole")]
        folded = sum(r.get("folds") == "equal" for r in made)
        share = f"{len(learned) / len(made):.0%}" if made else ""
        numbers = (len(of_group), len(made), folded, *ways, share, len(made) - len(learned))
        lines.append(f"| {group} | {' | '.join(map(str, numbers))} |")
    return lines
