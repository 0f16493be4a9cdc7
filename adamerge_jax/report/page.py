"""The report of a run: one HTML page that needs nothing but itself."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adamerge_jax.checkpoints.folders import readable_size
from adamerge_jax.report.coefficients import (
    count_coefficients,
    layer_means,
    spreads,
    value_range,
)
from adamerge_jax.report.colours import DIVERGING, SEQUENTIAL, cell_style
from adamerge_jax.report.curves import draw_curves
from adamerge_jax.report.maps import cosine_range, draw_expert, draw_similarity
from adamerge_jax.report.pictures import Picture, save_picture
from adamerge_jax.report.results import (
    TITLES,
    best_single,
    gap_closed,
    in_words,
    outcome,
    scores,
)
from adamerge_jax.runs.files import PAGE_FILE, RECIPE_FILE, write_whole
from adamerge_jax.runs.folder import SavedRun, Stage

PICTURE_FOLDER = "report"


_NOTHING = "\N{EN DASH}"
"""What a cell without a number holds."""


class Cell(NamedTuple):
    """A cell of a table: its text, its CSS, and whether it is the best of its column."""

    text: str
    style: str = ""
    best: bool = False


class Line(NamedTuple):
    """A line of a table: its heading and its cells."""

    name: str
    cells: list[Cell]


class Grid(NamedTuple):
    """A table: what it shows, the headings of its columns, its lines."""

    caption: str
    columns: list[str]
    lines: list[Line]


def write_page(folder: Path) -> Path:
    """Writes the report of a run into its folder: `report.html`, and its figures in `report/`.

    What the run has not left, because it was interrupted or had no test data, is named as missing.

    Args:
        folder: The run folder.

    Returns:
        The page.

    Raises:
        InputError: It is no run folder, or a file in it cannot be read.
    """
    run = SavedRun.open(folder)
    pictures = folder / PICTURE_FOLDER
    pictures.mkdir(exist_ok=True)
    environment = Environment(
        loader=PackageLoader("adamerge_jax", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template("page.html.jinja").render(
        run=run,
        facts=_facts(run),
        missing=_missing(run),
        results=_results(run),
        coefficients=_coefficients(run, pictures),
        curves=_curves(run, pictures),
        similarity=_similarity(run, pictures),
        disagreement=_disagreement(run),
        base=_kept_from_base(run),
        cost=_cost(run),
        recipe=(folder / RECIPE_FILE).read_text(encoding="utf-8"),
    )
    file = folder / PAGE_FILE
    write_whole(file, page.encode())
    return file


def _facts(run: SavedRun) -> list[str]:
    """The run in a few sentences."""
    chosen = run.recipe["coefficients"]
    base = run.recipe["base"]["path"]
    facts = [
        f"{len(run.tasks)} experts of {base}; {chosen['granularity']} coefficients, "
        f"constraint {chosen['constraint']}, preset {run.recipe['preset']}."
    ]
    if run.rows:
        facts.append(outcome(run.rows))
    return facts


def _missing(run: SavedRun) -> list[str]:
    """What the report cannot show, and why."""
    missing = []
    steps = run.recipe["learning"]["steps"]
    if run.coefficients is None:
        done = run.stages[-1][-1].step if run.stages else 0
        missing.append(
            f"No coefficients: learning has not ended; step {done} of {steps} was the last."
        )
    elif run.stages and run.best is None:
        missing.append(
            "The coefficients are not those of the last stage of learning, which has not ended."
        )
    if not run.rows:
        tested = all(task.get("test") for task in run.recipe["tasks"].values())
        missing.append(
            "No table of results: the run has not come to its end."
            if tested
            else "No table of results: the recipe names no test data."
        )
    if not run.stages:
        missing.append("No learning curves: there is no metrics.jsonl.")
    if not run.record:
        missing.append(
            "No similarity of the task vectors, no account of what was kept from the base, no time "
            "and memory: there is no run.json."
        )
    return missing


def _results(run: SavedRun) -> Grid | None:
    if not run.rows:
        return None
    best = best_single(run.rows)
    lines = []
    for row in run.rows:
        # The experts are several models: theirs is what a merge is to reach, not a rival's.
        single = not row.method.startswith("experts")
        cells = [
            Cell(in_words(score, row.metric), best=single and score == top)
            for score, top in zip(scores(row), best, strict=True)
        ]
        lines.append(Line(row.method, cells))
    closed = gap_closed(run.rows)
    if closed is not None:
        cells = [Cell(_NOTHING if part is None else f"{100 * part:.0f}%") for part in closed]
        lines.append(Line("gap closed", cells))
    return Grid(TITLES[run.rows[0].metric], [*run.rows[0].tasks, "average"], lines)


def _coefficients(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    if run.coefficients is None:
        return None
    learned = run.coefficients
    experts = [expert.name for expert in learned.experts]
    low, high = value_range(learned)
    layers, means = layer_means(learned)
    lines = [
        Line(layer, [Cell(f"{mean:.2f}", cell_style(mean, low, high)) for mean in row])
        for layer, row in zip(layers, means, strict=True)
    ]
    spread = [
        Line(expert, [Cell(f"{value:.3f}") for value in own])
        for expert, own in zip(experts, spreads(learned), strict=True)
    ]
    maps = []
    for position, expert in enumerate(experts):
        figure = draw_expert(learned, position)
        if figure is not None:
            own = means[:, position]
            most, least = layers[int(own.argmax())], layers[int(own.argmin())]
            words = (
                f"Mean coefficient of each tensor of {expert}, by layer. Most of it goes into "
                f"{most} ({own.max():.2f} on average), least into {least} ({own.min():.2f})."
            )
            maps.append(
                save_picture(figure, pictures / f"coefficients-{expert}.png", expert, words)
            )
    return {
        "count": count_coefficients(learned),
        "by_layer": Grid("Mean coefficient by layer and expert", experts, lines),
        "scale": _scale(low, high, SEQUENTIAL),
        "spread": Grid(
            "All coefficients of an expert",
            ["mean", "standard deviation", "smallest", "largest"],
            spread,
        ),
        "maps": maps,
    }


def _scale(low: float, high: float, colours: str) -> list[Cell]:
    """The key of a heat map: a few values in their colours."""
    values = np.linspace(low, high, 6)
    return [Cell(f"{value:.2f}", cell_style(value, low, high, colours)) for value in values]


def _curves(run: SavedRun, pictures: Path) -> list[tuple[str, list[Picture]]]:
    """The learning curves of each stage, with its title."""
    drawn = []
    for number, stage in enumerate(run.stages):
        last = number == len(run.stages) - 1
        title = "" if len(run.stages) == 1 else ("Learning" if last else "Coarse coefficients")
        kept = run.best if last else None
        prefix = "curves" if last else f"curves-coarse-{number}"
        own = [
            save_picture(
                draw_curves(stage, task, kept),
                pictures / f"{prefix}-{task}.png",
                task,
                _curve_in_words(stage, task, run),
            )
            for task in run.tasks
        ]
        drawn.append((title, own))
    return drawn


def _curve_in_words(stage: Stage, task: str, run: SavedRun) -> str:
    looks = [record for record in stage if record.held_out is not None]
    if not looks:
        return f"Learning curve of {task} over {stage[-1].step} steps."
    words = (
        f"Learning curves of {task}: its held-out objective goes from "
        f"{looks[0].held_out[task]:.3f} at step {looks[0].step} to "
        f"{looks[-1].held_out[task]:.3f} at step {looks[-1].step}."
    )
    if run.best is not None and stage is run.stages[-1]:
        words += f" The coefficients of step {run.best.step} were kept."
    return words


def _similarity(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    found = run.record.get("similarity")
    if not found or len(found["experts"]) < 2:
        return None
    experts = found["experts"]
    save_picture(draw_similarity(found), pictures / "similarity.png", "", "")
    matrices = [found["cosines"], *(own["cosines"] for own in found["layers"].values())]
    limit = cosine_range(matrices)

    def matrix(caption: str, cosines: Sequence[Sequence[float | None]]) -> Grid:
        lines = []
        for row, (expert, values) in enumerate(zip(experts, cosines, strict=True)):
            cells = [
                Cell("1") if row == column else _cosine_cell(value, limit)
                for column, value in enumerate(values)
            ]
            lines.append(Line(expert, cells))
        return Grid(caption, experts, lines)

    by_layer = [
        Line(layer, [_cosine_cell(v, limit) for v in _mean_to_others(own["cosines"])])
        for layer, own in found["layers"].items()
    ]
    norms = [Cell(f"{norm:.3g}") for norm in found["norms"]]
    return {
        "overall": matrix("Cosine between experts, all merged parameters", found["cosines"]),
        "scale": _scale(-limit, limit, DIVERGING),
        "norms": Grid("Length of the task vectors", experts, [Line("norm", norms)]),
        "by_layer": Grid("Mean cosine to the other experts, by layer", experts, by_layer),
        "layers": [matrix(layer, own["cosines"]) for layer, own in found["layers"].items()],
    }


def _cosine_cell(value: float | None, limit: float) -> Cell:
    if value is None:
        return Cell(_NOTHING)
    return Cell(f"{value:.2f}", cell_style(value, -limit, limit, DIVERGING))


def _mean_to_others(cosines: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean cosine of each expert to the others that have a task vector there."""
    means = []
    for row, values in enumerate(cosines):
        known = [v for column, v in enumerate(values) if column != row and v is not None]
        means.append(float(np.mean(known)) if known else None)
    return means


_COMPARED_WITH = {
    "expert": "the classes that the expert gives",
    "labels": "the labels",
    "tokens": "the tokens to predict",
}


def _disagreement(run: SavedRun) -> dict[str, Any] | None:
    """The part of the held-out examples on which merge and expert disagree, before and after."""
    looks = [record for record in (run.stages or [[]])[-1] if record.agreement is not None]
    if not looks:
        return None
    # Of two stages, the start of the first is the start.
    before = run.stages[0][0].agreement or looks[0].agreement
    after = run.best if run.best is not None and run.best.agreement is not None else looks[-1]
    compared: dict[str, list[str]] = {}
    examples = run.record.get("examples", {})
    lines = []
    for task in run.tasks:
        first, last = before[task], after.agreement[task]
        if first is None or last is None:
            continue
        if what := _COMPARED_WITH.get(run.record.get("agreement_with", {}).get(task)):
            compared.setdefault(what, []).append(task)
        cells = [
            Cell(str(examples[task]["held_out"]) if task in examples else _NOTHING),
            *(Cell(f"{100 * (1 - value):.1f}%") for value in (first, last)),
        ]
        lines.append(Line(task, cells))
    if not lines:
        return None
    columns = ["held-out examples", "before", "after"]
    return {
        "grid": Grid("Part of the held-out examples", columns, lines),
        "compared": list(compared.items()),
        "step": after.step,
        "kept": after is run.best,
    }


def _kept_from_base(run: SavedRun) -> dict[str, Any] | None:
    tensors = run.record.get("tensors")
    if tensors is None:
        return None
    return {
        "merged": f"{tensors['merged']:,}",
        "parameters": f"{tensors['parameters']:,}",
        "patterns": run.recipe["keep_from_base"],
        "kept": _by_pattern(tensors["kept"]),
        "unchanged": _by_pattern(tensors["unchanged"]),
    }


def _by_pattern(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names with `*` for their numbers, and how many each stands for."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return list(patterns.items())


def _cost(run: SavedRun) -> Grid | None:
    """What the run took, one number a line."""
    facts: dict[str, str] = {}
    record = run.record
    if run.coefficients is not None:
        facts["coefficients"] = f"{count_coefficients(run.coefficients):,}"
    if "examples" in record:
        for part, words in (("learning", "to learn from"), ("held_out", "held out")):
            total = sum(own[part] for own in record["examples"].values())
            facts[f"examples {words}"] = f"{total:,}"
    steps = [r.seconds for stage in run.stages for r in stage if r.objective is not None]
    if steps:
        facts["steps"] = f"{len(steps):,}"
        facts["steps per second (median)"] = f"{1 / np.median(steps):.3g}"
    for name, seconds in record.get("seconds", {}).items():
        facts[f"time: {name}"] = f"{seconds:,.1f} s"
    if "seconds" in record:
        facts["time: all of it"] = f"{sum(record['seconds'].values()):,.1f} s"
    for name, size in record.get("peak_memory_bytes", {}).items():
        facts[f"peak memory of the {name}"] = readable_size(size)
    if "device" in record:
        facts["device"] = record["device"]
    facts |= record.get("versions", {})
    if not facts:
        return None
    return Grid(
        "What the run took", [""], [Line(name, [Cell(text)]) for name, text in facts.items()]
    )


def _breakable(name: str) -> Markup:
    """A dotted name or a path that may be broken into lines behind its dots and slashes."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))
