"""The page of `any_model.py`: sums by kind of data, and every type that is not whole."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

GROUPS = ("text", "image", "image-text", "other")

WAYS = ("own", "bridge", "whole")

COMMAND = "python experiments/benchmarks/any_model.py --page docs/guides/model_types.md"

_EXPLAINED = """\
- **made**: a tiny random model can be made. **fold**: `adamerge merge` gives every tensor of the
  merge in float64.
- **learn**: five steps of Adam give a PyTorch loop's coefficients within 1e-4; where they do not in
  float32, both learn in float64, and the types are named below. **own**: by our own
  family. **bridge**: by the model's own PyTorch forward, as `adamerge learn` does it. **whole**: by
  the same bridge, in classes for which recipes have no kind yet, and of models that recipes refuse;
  the Python API alone learns them.
- **learn, of those made**: the three together.
- Results are in `experiments/benchmarks/any_model.jsonl`, a line a type. The command runs types
  that have none. Results from before a change of the package stay until `--again` repeats them: a
  reason below may be gone.
- Models that read images and texts are given both where a rule makes such inputs and recipes take
  images of this kind; the list says which were given texts alone.
- Parts of models get random states by the names of their forward's arguments. Sizes, such as
  `grid_thw`, are known as a step is compiled. A model without a forward is run by its `encode`.
- A refusal may come from the tiny config, which is made by rule, and not from the type: the patches
  of its images may not fill the pieces that the model joins them to. Types that run in configs of
  their own are named in [Models without a family here](pytorch_forward.md) and
  [Vision-language models](vision_language.md)."""


_NO_RESULT = "no result within the time limit"

_TEMPORARY = re.compile(r"/(?:\S*/)?tmp\w{8}/")
"""The folder of one type's models, as error messages name it."""


def read(file: Path) -> dict[str, Result]:
    """Returns the results of a file by type; the last of several is taken."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["type"]: result for result in map(json.loads, lines)}


def write(file: Path, results: Iterable[Result]) -> None:
    """Writes a line a type, sorted."""
    whole = sorted(results, key=lambda result: result["type"])
    new = file.with_suffix(".new")
    new.write_text("".join(f"{_TEMPORARY.sub('', json.dumps(result))}\n" for result in whole))
    new.replace(file)


def installed() -> dict[str, str]:
    """Returns the versions that are a part of a result."""
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}


def timed_out(result: Result, seconds: int) -> Result:
    """Returns the result of a type whose process was ended before its last stage."""
    missing = ("folds", "learns") if result.get("made") else ("reason",)
    return {**dict.fromkeys(missing, _NO_RESULT), "seconds": seconds, **result}


def in_words(result: Result) -> str:
    """Returns the outcome of one type."""
    if not result.get("made"):
        return f"not made: {result.get('reason', '')}"
    if result["folds"] != "equal":
        return f"does not fold: {result['folds']}"
    if result["learns"] != "equal":
        return f"does not learn: {_reason(result)}"
    return f"equal by {result['way']}, {result['difference']:.0e}, {result['compile']} s"


def group_of(result: Result) -> str:
    """Returns the group of the kinds of data that a type reads."""
    kinds = set(result.get("modalities", ()))
    if "text" in kinds and kinds & {"image", "video"} and kinds <= {"text", "image", "video"}:
        return "image-text"
    return next((kind for kind in ("text", "image") if kinds == {kind}), "other")


def page(results: Sequence[Result], count: int) -> list[str]:
    """Returns the lines of the page.

    Args:
        results: The results, sorted by type.
        count: The number of all types.
    """
    made = [result for result in results if result.get("made")]
    learned = [result for result in made if result["learns"] == "equal"]
    rest = f" The other {count - len(results)} were not run." if count > len(results) else ""
    with_versions = " and ".join(
        f"`{name}` {', '.join(sorted({result[name] for result in results}))}"
        for name in ("transformers", "torch")
    )
    seconds = [result["compile"] for result in learned]
    lines = [
        "# Every model type",
        "",
        f"Tiny random models of {len(results)} of the {count} types, with {with_versions}.{rest} "
        "Made by",
        "",
        f"    {COMMAND}",
        "",
        *summary(results),
        "",
        *_EXPLAINED.splitlines(),
    ]
    if seconds:
        lines += [
            "",
            f"Compiling a step of a model that learns takes {statistics.median(seconds):.1f} s of "
            f"a core (median), and {max(seconds):.1f} s at most.",
        ]
    unequal = [result for result in made if result["folds"] != "equal"]
    lines += _list("Do not fold", unequal, lambda result: result["folds"])
    others = [result for result in made if result["learns"] != "equal"]
    lines += _list("Do not learn", others, _reason)
    refused = [result for result in learned if "recipe" in result]
    lines += _list("Learned by the Python API alone", refused, lambda result: result["recipe"])
    wide = [result for result in learned if "in_float32" in result]
    lines += _list("Compared in float64", wide, _both_differences)
    absent = [result for result in results if not result.get("made")]
    lines += _list("Not made", absent, lambda result: result.get("reason", ""))
    lines += ["", "## Learn", ""]
    for way in WAYS:
        names = ", ".join(map(_name, (r for r in learned if r["way"] == way)))
        lines += [f"- **{way}**: {names or 'none'}"]
    return lines


def summary(results: Sequence[Result]) -> list[str]:
    """Returns a Markdown table with a line a group."""
    columns = ("types", "made", "fold", *WAYS, "learn, of those made")
    lines = [f"| reads | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for group in (*GROUPS, "all"):
        of_group = [r for r in results if group in ("all", group_of(r))]
        made = [r for r in of_group if r.get("made")]
        learned = [r for r in made if r["learns"] == "equal"]
        by_way = [sum(r["way"] == way for r in learned) for way in WAYS]
        folded = sum(r["folds"] == "equal" for r in made)
        share = f"{len(learned)} ({len(learned) / len(made):.0%})" if made else "0"
        cells = (group, len(of_group), len(made), folded, *by_way, share)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _reason(result: Result) -> str:
    """Returns the reason for which a type does not learn."""
    if result["learns"] == "differs":
        return f"by {result['way']}, {result['difference']:.0e} from PyTorch's"
    return result["learns"]


def _both_differences(result: Result) -> str:
    """Returns how far a type's coefficients are from PyTorch's in both dtypes."""
    return f"{result['difference']:.0e} from PyTorch's, in float32 {result['in_float32']:.0e}"


def _name(result: Result) -> str:
    is_blind = group_of(result) == "image-text" and not any(
        name.startswith("pixel_values") for name in result["inputs"]
    )
    return f"`{result['type']}`{' (texts alone)' if is_blind else ''}"


def _list(title: str, results: Iterable[Result], reason: Callable[[Result], str]) -> list[str]:
    """Returns a section with the types by reason."""
    types = defaultdict(list)
    for result in results:
        types[_TEMPORARY.sub("", reason(result))].append(f"`{result['type']}`")
    if not types:
        return []
    lines = [
        f"- {', '.join(names)}: {_plain(text)}"
        for text, names in sorted(types.items(), key=lambda item: -len(item[1]))
    ]
    return ["", f"## {title}", "", *lines]


def _plain(text: str) -> str:
    """Returns a reason as Markdown shows it."""
    return text.translate({ord(letter): f"\\{letter}" for letter in "*_<>[]|`"})
