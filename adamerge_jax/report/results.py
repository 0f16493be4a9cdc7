"""The table of results: in the terminal, as JSON, and what it says of the merge."""

from collections.abc import Sequence

from rich.table import Table

from adamerge_jax.runs.results import Row

TITLES = {"accuracy": "Accuracy (%)", "loss": "Loss (nats per token)"}
"""What a table of results shows, by its metric."""

_OF_EXPERTS, _OF_TASK_ARITHMETIC = "experts", "task arithmetic"
"""How the names of two baselines begin."""


def results_table(rows: Sequence[Row]) -> Table:
    """Scores: one line per method, one column per task, the average last.

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
        table.add_row(
            row.method,
            *(in_words(score, row.metric) for score in scores(row)),
            style="bold green" if row is rows[-1] else None,
        )
    if len(rows) > 1:
        table.caption, table.caption_justify = outcome(rows), "left"
    return table


def outcome(rows: Sequence[Row]) -> str:
    """What the merge reaches and, if that is known, closes of the gap, as a sentence."""
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
    """A score as the tables show it."""
    return f"{100 * score:.1f}" if metric == "accuracy" else f"{score:.3f}"


def scores(row: Row) -> list[float]:
    """The scores of a row: one per task, then the average."""
    return [*row.tasks.values(), row.average]


def best_single(rows: Sequence[Row]) -> list[float]:
    """The best score in each column, the average last, among rows that are one model each."""
    single = [scores(row) for row in rows if not row.method.startswith(_OF_EXPERTS)]
    best = max if rows[0].metric == "accuracy" else min
    return [best(column) for column in zip(*single, strict=True)]


def gap_closed(rows: Sequence[Row]) -> list[float | None] | None:
    """Which part of the gap between task arithmetic and the experts the merge closes.

    That is `(merge - arithmetic) / (experts - arithmetic)`: 0 is as good as task arithmetic, 1 as
    good as all the experts.

    Args:
        rows: The learned merge last.

    Returns:
        One number per task, then that of the averages; None where the experts are no better than
        task arithmetic. None for all where one of the two is not in the table.
    """

    def find(method: str) -> list[float] | None:
        return next((scores(row) for row in rows if row.method.startswith(method)), None)

    experts, arithmetic = find(_OF_EXPERTS), find(_OF_TASK_ARITHMETIC)
    if experts is None or arithmetic is None:
        return None
    sign = 1 if rows[0].metric == "accuracy" else -1
    return [
        (merged - low) / (high - low) if sign * (high - low) > 0 else None
        for merged, low, high in zip(scores(rows[-1]), arithmetic, experts, strict=True)
    ]
