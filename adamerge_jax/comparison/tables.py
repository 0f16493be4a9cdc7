"""The tables of a comparison, for a console and in Markdown."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from adamerge_jax.comparison.summary import Comparison, MethodSummary, Spread
from adamerge_jax.report.markdown import in_markdown
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.report.results import TITLES, in_words, percentage
from adamerge_jax.runs.outcome import Estimate
from adamerge_jax.runs.rows import Metric


class _Column(NamedTuple):
    """A column: its heading, and its cell of a method."""

    heading: str
    cell: Callable[[MethodSummary], str]


def score_table(comparison: Comparison) -> Table:
    """Returns the scores by task, with their average."""
    return _as_table(comparison, _score_columns(comparison), TITLES[comparison.metric])


def standing_table(comparison: Comparison) -> Table:
    """Returns the place of each method beside the experts, and its cost."""
    table = _as_table(comparison, _standing_columns(comparison), "On average, and the cost")
    table.caption = Text(_legend(comparison, one_line))
    table.caption_justify = "left"
    return table


def as_markdown(comparison: Comparison, title: str) -> str:
    """Returns both tables as a page of Markdown.

    Args:
        comparison: The results.
        title: The title of the page.
    """
    lines = [f"# {in_markdown(title)}", ""]
    for table in (comparison, *comparison.further):
        lines += _markdown_table(table, TITLES[table.metric], _score_columns(table))
        lines += _markdown_table(table, "On average, and the cost", _standing_columns(table))
        lines += [_legend(table, lambda text: str(in_markdown(text))), ""]
    for name, reason in comparison.failed.items():
        lines.append(f"- {in_markdown(name)} has no row: {in_markdown(reason)}")
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(comparison: Comparison, heading: str, columns: Sequence[_Column]) -> list[str]:
    """Returns the lines of a section with one table."""
    lines = [f"## {heading}", "", _markdown_row(["method", *(c.heading for c in columns)])]
    lines.append("| --- |" + " ---: |" * len(columns))
    for summary in comparison.methods:
        numbers = (Markup(column.cell(summary)) for column in columns)
        lines.append(_markdown_row([summary.name, *numbers]))
    return [*lines, ""]


def _score_columns(comparison: Comparison) -> list[_Column]:
    metric = comparison.metric

    def of_task(task: str) -> _Column:
        return _Column(task, lambda summary: in_words(summary.tasks[task].mean, metric))

    return [
        *map(of_task, comparison.methods[0].tasks),
        _Column("average", lambda summary: _spread_in_words(summary.average, metric)),
    ]


def _standing_columns(comparison: Comparison) -> list[_Column]:
    metric = comparison.metric

    def score_interval(summary: MethodSummary) -> str:
        return _interval(summary.standing and summary.standing.score, metric)

    def share(summary: MethodSummary) -> str:
        return percentage(summary.standing and summary.standing.share, 1) or ""

    def closed(summary: MethodSummary) -> str:
        return _closed_in_words(summary.standing and summary.standing.closed)

    def beyond_heads(summary: MethodSummary) -> str:
        return _closed_in_words(summary.beyond_heads)

    has_heads = comparison.reference_with_heads is not None

    def memory(summary: MethodSummary) -> str:
        peak = summary.peak_memory_bytes
        return "" if peak is None else f"{peak / 1e9:.2f}"

    return [
        _Column("average", lambda summary: _spread_in_words(summary.average, metric)),
        _Column("95% interval", score_interval),
        _Column("of experts", share),
        _Column("gap closed", closed),
        *([_Column("beyond heads", beyond_heads)] if has_heads else []),
        _Column(
            "coefficients",
            lambda summary: f"{summary.coefficients:,}" if summary.coefficients else "",
        ),
        _Column("steps", lambda summary: str(summary.steps or "")),
        _Column("seconds", lambda s: "" if s.seconds is None else f"{s.seconds:.1f}"),
        _Column("peak GB", memory),
        _Column("seeds", lambda summary: str(len(summary.seeds) or "")),
    ]


def _as_table(comparison: Comparison, columns: Sequence[_Column], title: str) -> Table:
    table = Table(title=title, title_style="bold")
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(Text(one_line(column.heading)), justify="right", no_wrap=True)
    styles = {"learned": "bold green", "heads": "green", "experts": "dim", "baseline": None}
    for summary in comparison.methods:
        cells = [Text(one_line(column.cell(summary))) for column in columns]
        style = styles[summary.kind] if summary.seeds else "dim"
        table.add_row(Text(one_line(summary.name)), *cells, style=style)
    return table


def _legend(comparison: Comparison, name: Callable[[str], str]) -> str:
    """Returns what the columns mean."""
    sentences = [
        "Mean and standard deviation over seeds.",
        "Intervals are those of other test data of the same size, paired over all rows.",
    ]
    if comparison.reference is not None:
        sentences.append(
            f"The gap is that from {name(comparison.reference)}, the best without learning, to the "
            "experts."
        )
    if comparison.reference_with_heads is not None:
        sentences.append(
            f"Beyond heads: that from {name(comparison.reference_with_heads)}, the best without "
            "learning but for its heads."
        )
    for summary in comparison.methods:
        if summary.chosen:
            words = ", ".join(f"{option} {value}" for option, value in summary.chosen.items())
            sentences.append(f"{name(summary.name)} chose {name(words)}.")
    sentences.append(f"Measured on {name(', '.join(comparison.devices))}.")
    return " ".join(sentences)


def _spread_in_words(spread: Spread, metric: Metric) -> str:
    words = in_words(spread.mean, metric)
    if spread.deviation is None:
        return words
    return f"{words} ± {in_words(spread.deviation, metric)}"


def _closed_in_words(estimate: Estimate | None) -> str:
    interval = _interval(estimate, "accuracy", digits=0)
    return (percentage(estimate, 0) or "") + (f" ({interval})" if interval else "")


def _interval(estimate: Estimate | None, metric: Metric, digits: int | None = None) -> str:
    if estimate is None or estimate.interval is None:
        return ""
    if digits is not None:
        return " to ".join(f"{100 * end:.{digits}f}" for end in estimate.interval)
    return " to ".join(in_words(end, metric) for end in estimate.interval)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(in_markdown(cell)) for cell in cells) + " |"
