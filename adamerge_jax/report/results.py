"""The table of results for people, and what it says of the merge."""

from collections.abc import Sequence

from rich.table import Table

from adamerge_jax.runs.results import Row

TITLES = {"accuracy": "Accuracy (%)", "loss": "Loss (nats per token)"}
"""The title of a table of results, by its metric."""

_EXPERTS, _TASK_ARITHMETIC = "experts", "task arithmetic"
"""The beginnings of the names of two baselines."""


def results_table(rows: Sequence[Row]) -> Table:
    """Returns the scores: one line per method, one column per task, the average last.

    The last row is the merge that the run learned and stands out; what it closes of the gap is
    said below.
    """
    table = Table(title=TITLES[rows[0].metric], title_style="bold")
    # A method may be called by a long path: that is broken into lines, numbers never are.
    table.add_column("method", overflow="fold")
    for task in rows[0].tasks:
        table.add_column(task, justify="right", no_wrap=True)
    table.add_column("average", justify="right", style="bold", no_wrap=True)
    for row in rows:
        style = "bold green" if row is rows[-1] else None
        table.add_row(row.method, *scores_in_words(row), style=style)
    if len(rows) > 1:
        table.caption, table.caption_justify = outcome(rows), "left"
    return table


def outcome(rows: Sequence[Row]) -> str:
    """Returns a sentence on what the merge reaches and, if known, closes of the gap."""
    merged, closed = rows[-1], gap_closed(rows)
    unit = "%" if merged.metric == "accuracy" else " nats per token"
    sentence = f"The merge reaches {in_words(merged.average, merged.metric)}{unit} on average"
    if closed is not None and closed[-1] is not None:
        sentence += (
            f" and closes {100 * closed[-1]:.0f}% of the gap between task arithmetic and the "
            "experts"
        )
    return sentence + "."


def in_words(score: float, metric: str) -> str:
    """Returns a score as tables show it."""
    return f"{100 * score:.1f}" if metric == "accuracy" else f"{score:.3f}"


def scores(row: Row) -> list[float]:
    """Returns the scores of a row: one per task, then the average."""
    return [*row.tasks.values(), row.average]


def scores_in_words(row: Row) -> list[str]:
    """Returns the scores of a row as tables show them."""
    return [in_words(score, row.metric) for score in scores(row)]


def is_single_model(row: Row) -> bool:
    """Returns False for the experts, which are one model per task: no rival of a merge."""
    return not row.method.startswith(_EXPERTS)


def best_single(rows: Sequence[Row]) -> list[float]:
    """Returns the best score in each column, the average last, among single models."""
    best = max if rows[0].metric == "accuracy" else min
    columns = zip(*(scores(row) for row in rows if is_single_model(row)), strict=True)
    return [best(column) for column in columns]


def gap_closed(rows: Sequence[Row]) -> list[float | None] | None:
    """Returns the part of the gap between task arithmetic and the experts that the merge closes.

    That is `(merge - arithmetic) / (experts - arithmetic)`: 0 is as good as task arithmetic, 1 as
    good as all the experts.

    Args:
        rows: The table, the learned merge last.

    Returns:
        One number per task, then that of the averages; None where the experts are no better than
        task arithmetic. None for all where one of the two is not in the table.
    """

    def scores_of(method: str) -> list[float] | None:
        return next((scores(row) for row in rows if row.method.startswith(method)), None)

    experts, arithmetic = scores_of(_EXPERTS), scores_of(_TASK_ARITHMETIC)
    if experts is None or arithmetic is None:
        return None
    sign = 1 if rows[0].metric == "accuracy" else -1
    return [
        (merged - low) / (high - low) if sign * (high - low) > 0 else None
        for merged, low, high in zip(scores(rows[-1]), arithmetic, experts, strict=True)
    ]
