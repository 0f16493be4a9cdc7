"""The report of a run: one HTML page that needs nothing but itself."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from adamerge_jax.checkpoints.folders import readable_size
from adamerge_jax.coefficients.file import IN_MEMORY, Coefficients
from adamerge_jax.files.writing import write_whole
from adamerge_jax.report.coefficients import (
    LayerSpread,
    count_coefficients,
    layer_spreads,
    range_around_start,
    range_warning,
    spreads,
    start_of,
)
from adamerge_jax.report.colours import DIVERGING, SEQUENTIAL, cell_style
from adamerge_jax.report.curves import ALL_TASKS, draw_curves, summed
from adamerge_jax.report.front import draw_front
from adamerge_jax.report.grids import Cell, Grid, Line, Strip
from adamerge_jax.report.harness import HarnessTable
from adamerge_jax.report.maps import cosine_range, draw_expert, draw_similarity
from adamerge_jax.report.pictures import (
    Picture,
    label_text,
    picture_name,
    save_picture,
    write_png,
)
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.report.predictions import prediction_views
from adamerge_jax.report.rendering import render
from adamerge_jax.report.results import (
    TITLES,
    best_single,
    interval_in_percent,
    outcome_in_words,
    percentage,
    scores,
    scores_in_words,
)
from adamerge_jax.report.score_chart import COUNTED, score_panels
from adamerge_jax.report.score_curve import LARGEST_DRAWN, draw_scores
from adamerge_jax.report.without_experts import Losses, losses_grid, losses_in_words
from adamerge_jax.runs.files import FRONT_FOLDER, FRONT_PICTURE_FILE, PAGE_FILE, RECIPE_FILE
from adamerge_jax.runs.folder import SavedRun, Stage, StepRecord
from adamerge_jax.runs.outcome import Outcome
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import SHARES

PICTURE_FOLDER = "report"


_NOTHING = "\N{EN DASH}"
"""The text of a cell without a number."""


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
    script = resources.files(__package__).joinpath("sorting.js").read_text(encoding="utf-8")
    page = render(
        "page.html.jinja",
        script=Markup(script),
        script_hash=_hash_of_script(script),
        run=run,
        facts=_facts(run),
        origin=_origin(run),
        missing=_missing(run),
        results=_results(run),
        harness=_harness(run),
        without=_without_experts(run),
        coefficients=_coefficients(run, pictures),
        curves=_curves(run, pictures),
        search=_search(run, pictures),
        front=_front(run, pictures),
        similarity=_similarity(run, pictures),
        disagreement=_disagreement(run),
        predictions=prediction_views(run.predictions),
        base=_kept_from_base(run),
        cost=_cost(run),
        recipe=(folder / RECIPE_FILE).read_text(encoding="utf-8"),
    )
    file = folder / PAGE_FILE
    write_whole(file, page)
    return file


def _facts(run: SavedRun) -> list[str]:
    """Describes the run in a few sentences."""
    fields = run.recipe["coefficients"]
    origin = f"{len(run.tasks)} experts of {_named(run.recipe['base']['path'])}; "
    if run.evaluations:
        words, _ = _score(run)
        facts = [f"{origin}{len(run.evaluations)} merges were scored by {words}."]
    else:
        facts = [
            f"{origin}{fields['granularity']} coefficients, constraint {fields['constraint']}, "
            f"preset {run.recipe['preset']}."
        ]
    start = run.coefficients.initial_merge if run.coefficients else None
    if start is not None:
        words = one_line(start.in_words, longest=1000)
        facts.append(f"Task vectors are added to the merge by {words}, in place of the base.")
    if run.rows:
        facts.append(outcome_in_words(run.outcome, run.rows[-1].metric, name=one_line))
    return facts


def _named(source: str) -> str:
    return "a model in memory" if source == IN_MEMORY else one_line(source)


def _origin(run: SavedRun) -> dict[str, Any]:
    """Returns when and how the run was made, and of which recipe and models."""
    started, command = (run.record.get(field) for field in ("started", "command"))
    recipe = (run.folder / RECIPE_FILE).read_bytes()
    lines = [Line("recipe", [Cell(run.recipe["name"]), Cell(_short_hash(recipe))])]
    if run.coefficients is not None:
        sources = run.coefficients.base, *run.coefficients.experts
        for source in sources:
            words = source.source + (f" at {source.revision}" if source.revision else "")
            lines.append(Line(source.name, [Cell(words), Cell(source.identity[:19])]))
    return {
        "started": one_line(str(started)).replace("T", " ").replace("+00:00", " UTC")
        if started
        else None,
        "command": one_line(str(command), longest=1000) if command else None,
        "grid": Grid("What it was made of", ["source", "hash"], lines),
    }


def _hash_of_script(script: str) -> str:
    """Returns the hash by which a page allows its one script and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _short_hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()[:12]}"


def _missing(run: SavedRun) -> list[str]:
    """Explains which parts of the report are missing."""
    missing = []
    steps = run.recipe["learning"]["steps"]
    if run.evaluations:
        if run.coefficients is None and run.front is None:
            missing.append("No result: the run has not come to its end.")
    elif run.coefficients is None:
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
    if not run.stages and not run.evaluations:
        missing.append("No learning curves: there is no metrics.jsonl.")
    if not run.record:
        missing.append(
            "No similarity of the task vectors, no account of what was kept from the base, no time "
            "and memory: there is no run.json."
        )
    return missing


def _results(run: SavedRun) -> dict[str, Any] | None:
    if not run.rows:
        return None
    return {
        "tables": [_score_table(table) for table in run.results.tables],
        "reference": run.outcome and run.outcome.reference,
    }


def _score_table(results: Results) -> dict[str, Any]:
    """Returns a table of results, and the merge beside the experts in it."""
    rows, outcome = results.rows, results.outcome
    best = best_single(rows)
    lines = []
    for row in rows:
        cells = zip(scores_in_words(row), scores(row), best, strict=True)
        single = row.kind != "experts"
        lines.append(
            Line(
                row.method, [Cell(text, best=single and score == top) for text, score, top in cells]
            )
        )
    columns = [*rows[0].tasks, "average"]
    return {
        "scores": Grid(TITLES[rows[0].metric], columns, lines),
        "panels": score_panels(results),
        "counted": rows[0].metric in COUNTED,
        "beside": _beside_experts(outcome, columns),
        "loss": rows[0].metric not in SHARES,
        "reference": outcome and outcome.reference,
    }


def _beside_experts(outcome: Outcome | None, columns: list[str]) -> Grid | None:
    """Returns the merge's share of the experts' scores and of the gap, with their intervals."""
    if outcome is None or outcome.average.share is None:
        return None
    standings = [*outcome.tasks.values(), outcome.average]
    parts = [("share of the experts' score", [standing.share for standing in standings], 1)]
    if outcome.average.gap is not None:
        parts.append(("gap closed", [standing.closed for standing in standings], 0))
    headings: list[str] = []
    by_column: list[list[str]] = []
    for title, estimates, digits in parts:
        headings.append(title)
        by_column.append([percentage(estimate, digits) or _NOTHING for estimate in estimates])
        if any(estimate and estimate.interval for estimate in estimates):
            headings.append("its 95% interval")
            by_column.append([interval_in_percent(e, digits) or _NOTHING for e in estimates])
    lines = [
        Line(task, [Cell(text) for text in texts])
        for task, texts in zip(columns, zip(*by_column, strict=True), strict=True)
    ]
    return Grid("The merge beside the experts", headings, lines)


def _harness(run: SavedRun) -> dict[str, Any] | None:
    if run.results.harness is None:
        return None
    table = HarnessTable.of(run.results.harness)
    return {"grid": table.grid(), "words": table.in_words}


def _without_experts(run: SavedRun) -> dict[str, Any] | None:
    if not run.without_experts:
        return None
    losses = Losses.of(run.rows[-1], run.without_experts)
    return {"grid": losses_grid(losses), "words": losses_in_words(losses)}


def _coefficients(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    if run.coefficients is None:
        return None
    learned, experts = run.coefficients, list(run.coefficients.names)
    layers, rows = layer_spreads(learned)
    means = np.array([[spread.mean for spread in row] for row in rows])
    low, high = range_around_start(learned, means)
    place = _place_of(learned, [spread for row in rows for spread in row])
    lines = [
        Line(layer, [_spread_cell(spread, low, high, place) for spread in row])
        for layer, row in zip(layers, rows, strict=True)
    ]
    spread = [
        Line(expert, [Cell(f"{value:.3f}") for value in numbers])
        for expert, numbers in zip(experts, spreads(learned), strict=True)
    ]
    maps = []
    for position, expert in enumerate(experts):
        figure = draw_expert(learned, position)
        if figure is not None:
            words = f"Mean coefficient of each tensor of {expert}, by layer."
            of_expert = means[:, position]
            if np.isfinite(of_expert).any():
                most, least = (layers[int(f(of_expert))] for f in (np.nanargmax, np.nanargmin))
                words += (
                    f" Most of it goes into {most} ({np.nanmax(of_expert):.2f} on average), least "
                    f"into {least} ({np.nanmin(of_expert):.2f})."
                )
            maps.append(
                save_picture(
                    figure, pictures / picture_name("coefficients", expert, position), expert, words
                )
            )
    return {
        "count": count_coefficients(learned),
        "by_layer": Grid("Mean coefficient by layer and expert", experts, lines),
        "scale": _scale(low, high, DIVERGING),
        "start": f"{start_of(learned):g}",
        "has_spread": any(cell.strip for line in lines for cell in line.cells),
        "has_empty": bool(np.isnan(means).any()),
        "spread": Grid(
            "All coefficients of an expert",
            ["mean", "standard deviation", "smallest", "largest"],
            spread,
        ),
        "maps": maps,
        "warning": range_warning(learned),
    }


def _place_of(
    coefficients: Coefficients, spreads: Sequence[LayerSpread]
) -> Callable[[LayerSpread], Strip | None]:
    """Returns the function that places a layer's spread on the axis that all layers share."""
    start = start_of(coefficients)
    shown = [s for s in spreads if np.isfinite(s.mean)]
    low = min([start, *(s.low for s in shown)])
    width = max([start, *(s.high for s in shown)]) - low
    has_spread = any(s.high > s.low for s in shown)

    def place(spread: LayerSpread) -> Strip | None:
        if not has_spread or not np.isfinite(spread.mean) or not np.isfinite(width):
            return None
        ends = (spread.low, spread.high, start)
        return Strip(*(round(2 + 96 * (value - low) / width, 1) for value in ends))

    return place


def _spread_cell(
    spread: LayerSpread, low: float, high: float, place: Callable[[LayerSpread], Strip | None]
) -> Cell:
    """Returns the cell of a layer and an expert; empty where nothing has moved."""
    if not np.isfinite(spread.mean):
        return Cell("", title="all coefficients are where they started")
    title = f"eight of ten coefficients are from {spread.low:.2f} to {spread.high:.2f}"
    strip = place(spread)
    style = cell_style(spread.mean, low, high, DIVERGING)
    return Cell(f"{spread.mean:.2f}", style, strip=strip, title=title if strip else "")


def _scale(low: float, high: float, colours: str) -> list[Cell]:
    """Returns the key of a heat map: a few values in their colours."""
    values = np.linspace(low, high, 6)
    return [Cell(f"{value:.2f}", cell_style(value, low, high, colours)) for value in values]


def _curves(run: SavedRun, pictures: Path) -> list[tuple[str, list[Picture]]]:
    """Draws the learning curves of each stage; returns them with its title."""
    drawn = []
    for number, stage in enumerate(run.stages):
        last = number == len(run.stages) - 1
        title = "" if len(run.stages) == 1 else ("Learning" if last else "Coarse coefficients")
        best = run.best if last else None
        prefix = "curves" if last else f"curves-coarse-{number}"
        views = [
            (stage, task, best, picture_name(prefix, task, position))
            for position, task in enumerate(run.learned_from)
        ]
        if len(views) > 1:
            of_best = summed([best])[0] if best else None
            views.insert(0, (summed(stage), ALL_TASKS, of_best, f"total-{prefix}.png"))
        curves = [
            save_picture(
                draw_curves(steps, task, kept),
                pictures / file,
                task,
                _curve_in_words(steps, task, kept),
            )
            for steps, task, kept, file in views
        ]
        drawn.append((title, curves))
    return drawn


def _curve_in_words(stage: Stage, task: str, kept: StepRecord | None) -> str:
    evaluated = [record for record in stage if record.held_out is not None]
    if not evaluated:
        return f"Learning curve of {task} over {stage[-1].step} steps."
    words = (
        f"Learning curves of {task}: its held-out objective goes from "
        f"{evaluated[0].held_out[task]:.3f} at step {evaluated[0].step} to "
        f"{evaluated[-1].held_out[task]:.3f} at step {evaluated[-1].step}."
    )
    if kept is not None:
        words += f" The coefficients of step {kept.step} were kept."
    return words


def _score(run: SavedRun) -> tuple[str, bool]:
    """Returns the name of the score that merges were measured by, and True if more is better."""
    score = run.record.get("score", {})
    return one_line(str(score.get("words", "score"))), bool(score.get("maximise", True))


def _search(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    if not run.evaluations or run.front is not None:
        return None
    words, maximise = _score(run)
    finite = [e for e in run.evaluations if abs(e.score) <= LARGEST_DRAWN]
    single = [e for e in finite if e.phase == "single"]
    if not single:
        return None
    sign = 1 if maximise else -1
    start, best = (max(of, key=lambda e: sign * e.score) for of in (single, finite))
    alternative = (
        f"The score of each of {len(run.evaluations)} merges: {words}. The best single coefficient "
        f"has {start.score:.4g}, the best merge, of evaluation {best.number}, {best.score:.4g}."
    )
    figure = draw_scores(finite, label_text(words), maximise)
    return {
        "curve": save_picture(figure, pictures / "scores.png", "Score", alternative),
        "words": words,
        "start": f"{start.score:.4g}",
        "best": f"{best.score:.4g}",
        "number": best.number,
        "lost": len(run.evaluations) - len(finite),
    }


def _front(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    front = run.front
    if front is None:
        return None
    factor = 1 if front.score == "loss" else 100
    digits = 3 if front.score == "loss" else 1

    def shown(scores: dict[str, float], columns: list[str]) -> list[Cell]:
        return [Cell(f"{factor * scores[task]:.{digits}f}") for task in columns]

    tasks = front.tasks
    values = [value for point in front.points for value in point.coefficients.values()]
    low, high = min(0.0, *values), max(1.0, *values)
    coefficients, scores = [], []
    for position, point in enumerate(front.points):
        name = Path(point.file).stem + (" (best on average)" if position == front.best else "")
        cells = [point.coefficients[task] for task in tasks]
        coefficients.append(
            Line(name, [Cell(f"{value:.2f}", cell_style(value, low, high)) for value in cells])
        )
        mean = float(np.mean(list(point.scores.values())))
        scores.append(Line(name, [*shown(point.scores, tasks), *shown({"": mean}, [""])]))
    single, of_single = front.best_single
    for name, of_row in ((f"one coefficient, {single:g}", of_single), ("experts", front.experts)):
        mean = float(np.mean(list(of_row.values())))
        scores.append(Line(name, [*shown(of_row, tasks), *shown({"": mean}, [""])]))
    fits = [
        Line(
            task,
            [
                Cell(f"{factor * number:.{digits}f}")
                for number in (fit.error, fit.left_out_error, fit.spread)
            ],
        )
        for task, fit in front.fits.items()
    ]
    unit = " (%)" if factor == 100 else ""
    words = (
        f"The scores of {len(front.points)} merges of which none is better than another one in "
        f"every task, among {len(front.others)} others; the table below has the numbers."
    )
    title = f"What one task costs another: {front.score} on the validation data"
    return {
        "picture": save_picture(draw_front(front), run.folder / FRONT_PICTURE_FILE, title, words),
        "scores": Grid(f"{front.score}{unit} on the validation data", [*tasks, "average"], scores),
        "coefficients": Grid("Coefficient of each expert", tasks, coefficients),
        "scale": _scale(low, high, SEQUENTIAL),
        "fits": Grid(
            f"The surfaces' errors{unit}",
            ["on its merges", "on a merge left out", "of a constant"],
            fits,
        ),
        "folder": FRONT_FOLDER,
    }


def _similarity(run: SavedRun, pictures: Path) -> dict[str, Any] | None:
    similarity = run.record.get("similarity")
    if not similarity or len(similarity["experts"]) < 2:
        return None
    experts = similarity["experts"]
    write_png(draw_similarity(similarity), pictures / "similarity.png")
    matrices = [
        similarity["cosines"],
        *(numbers["cosines"] for numbers in similarity["layers"].values()),
    ]
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
        Line(layer, [_cosine_cell(v, limit) for v in _mean_to_others(numbers["cosines"])])
        for layer, numbers in similarity["layers"].items()
    ]
    norms = [Cell(f"{norm:.3g}") for norm in similarity["norms"]]
    return {
        "overall": matrix("Cosine between experts, all merged parameters", similarity["cosines"]),
        "scale": _scale(-limit, limit, DIVERGING),
        "norms": Grid("Length of the task vectors", experts, [Line("norm", norms)]),
        "by_layer": Grid("Mean cosine to the other experts, by layer", experts, by_layer),
        "layers": [
            matrix(layer, numbers["cosines"]) for layer, numbers in similarity["layers"].items()
        ],
    }


def _cosine_cell(value: float | None, limit: float) -> Cell:
    if value is None:
        return Cell(_NOTHING)
    return Cell(f"{value:.2f}", cell_style(value, -limit, limit, DIVERGING))


def _mean_to_others(cosines: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Returns the mean cosine of each expert to the others that have a task vector there."""
    means = []
    for row, values in enumerate(cosines):
        others = [v for column, v in enumerate(values) if column != row and v is not None]
        means.append(float(np.mean(others)) if others else None)
    return means


_COMPARED_WITH = {
    "expert": "the classes that the expert gives",
    "labels": "the labels",
    "tokens": "the tokens to predict",
}


def _disagreement(run: SavedRun) -> dict[str, Any] | None:
    """Returns on how many held-out examples merge and expert disagree, before and after."""
    evaluated = [record for record in (run.stages or [[]])[-1] if record.agreement is not None]
    if not evaluated:
        return None
    # Of two stages, the start of the first is the start.
    before = run.stages[0][0].agreement or evaluated[0].agreement
    after = run.best if run.best is not None and run.best.agreement is not None else evaluated[-1]
    compared: dict[str, list[str]] = {}
    examples = run.record.get("examples", {})
    lines = []
    for task in run.learned_from:
        first, last = before[task], after.agreement[task]
        if first is None or last is None:
            continue
        if reference := _COMPARED_WITH.get(run.record.get("agreement_with", {}).get(task)):
            compared.setdefault(reference, []).append(task)
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
        "kept": _by_pattern(tensors["kept"]),
        "unchanged": _by_pattern(tensors["unchanged"]),
    }


def _by_pattern(names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns names with `*` for their numbers, and how many names each of them stands for."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return list(patterns.items())


def _cost(run: SavedRun) -> Grid | None:
    """Returns the table of the run's cost, one number a line."""
    facts: dict[str, str] = {}
    record = run.record
    if run.coefficients is not None:
        facts["coefficients"] = f"{count_coefficients(run.coefficients):,}"
    if "examples" in record:
        for part, words in (("learning", "to learn from"), ("held_out", "held out")):
            total = sum(counts[part] for counts in record["examples"].values())
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
