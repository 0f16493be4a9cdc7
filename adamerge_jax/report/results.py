"""The table of results for people, and what it says of the merge."""

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from adamerge_jax.report.harness import harness_table
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.runs.outcome import FEWEST_EXAMPLES, Estimate, Outcome, measure_outcome
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import SHARES, Metric, Row

TITLES = {
    "accuracy": "Accuracy (%)",
    "loss": "Loss (nats per token)",
    "exact_match": "Exact match: the model's own answer is the response (%)",
    "token_accuracy": "Token accuracy: the likeliest token is the response's (%)",
    "base_answers": "General ability: the first sentence of the answer is the base's (%)",
    "base_agreement": "General ability: the likeliest token is the base's (%)",
    "base_divergence": "General ability: divergence from the base (nats per token)",
    "answer_loss": "Loss without the ends of texts (nats per token)",
    "spearman": "Spearman's correlation with the scores in the data (x 100)",
    "recall_at_1": "Recall at 1: the nearest text is the partner (%)",
    "recall_at_10": "Recall at 10: the partner is among the ten nearest texts (%)",
    "word_accuracy": "Accuracy of words (%)",
    "entity_f1": "F1 score of entities (%)",
    "micro_f1": "F1 score over all labels (%)",
    "macro_f1": "F1 score, the mean over the labels (%)",
    "pearson": "Pearson's correlation with the labels (x 100)",
    "r2": "R squared: the part of the labels' variance that is explained (x 100)",
    "of_each_task": "Scores (%), each task by its own metric, which a table below names",
}
"""The title of a table of results, by its metric."""


def results_table(rows: Sequence[Row], outcome: Outcome | None = None) -> Table:
    """Returns the scores: one line per method, one column per task, the average last.

    The last row is the merge that the run learned and stands out; its outcome is said below.

    Args:
        rows: The table.
        outcome: The outcome of the merge; by default it is measured from the rows.
    """
    table = Table(title=TITLES[rows[0].metric], title_style="bold")
    # Text and no string: whatever the console, names with brackets are not taken for styles.
    # A method may be called by a long path: that is broken into lines, numbers never are.
    table.add_column("method", overflow="fold")
    for task in rows[0].tasks:
        table.add_column(Text(one_line(task)), justify="right", no_wrap=True)
    table.add_column("average", justify="right", style="bold", no_wrap=True)
    for row in rows:
        style = "bold green" if row is rows[-1] else None
        table.add_row(Text(one_line(row.method)), *scores_in_words(row), style=style)
    if len(rows) > 1:
        outcome = outcome or measure_outcome(rows)
        table.caption = Text(outcome_in_words(outcome, rows[-1].metric, name=one_line))
        table.caption_justify = "left"
    return table


def results_tables(results: Results) -> list[Table]:
    """Returns the table of results, then those by other metrics, and the scores by lm-eval."""
    tables = [results_table(table.rows, table.outcome) for table in results.tables]
    return tables if results.harness is None else [*tables, harness_table(results.harness)]


def outcome_in_words(
    outcome: Outcome | None, metric: Metric, name: Callable[[str], str] = str
) -> str:
    """Returns sentences on what the merge reaches, beside the experts and from what start.

    Args:
        outcome: The outcome of the merge; None where a score of it is not finite.
        metric: The meaning of its scores.
        name: The function that writes a name of the table's rows and columns in its text.
    """
    if outcome is None:
        return "The merge has no finite score."
    sentences = _outcome_of_learning(outcome, metric, name)
    if outcome.with_heads is None or outcome.with_heads_score is None:
        return sentences
    unit = _unit(metric)
    score = in_words(outcome.with_heads_score, metric)
    return (
        f"{sentences} Of merges without learning whose heads alone were fitted, "
        f"{name(outcome.with_heads)} is the best, with {score}{unit}."
    )


def _outcome_of_learning(outcome: Outcome, metric: Metric, name: Callable[[str], str]) -> str:
    """Returns the sentences on the merge, the experts and the best row without learning."""
    average = outcome.average
    unit = _unit(metric)
    sentence = f"The merge reaches {in_words(average.score.value, metric)}{unit} on average"
    if average.share is not None:
        share = _with_interval(average.share, 100, 1, "%")
        worse = " (less is better)" if metric not in SHARES else ""
        sentence += f": {share} of the experts' average{worse}"
    if average.gap is None:
        return f"{sentence}."
    assert outcome.reference is not None  # a gap has two ends
    start = f"{name(outcome.reference)}, the best row without learning"
    if average.closed is not None:
        closed = _with_interval(average.closed, 100, 0, "%")
        return f"{sentence}. It closes {closed} of the gap from {start}, to the experts."
    if outcome.examples is not None and average.gap.interval is None:
        few = [task for task, size in outcome.examples.items() if size < FEWEST_EXAMPLES]
        if few:
            return (
                f"{sentence}. No gap can be told from so few test examples: {name(few[0])} has "
                f"{outcome.examples[few[0]]}, and {FEWEST_EXAMPLES} are needed."
            )
    gap = (
        _with_interval(average.gap, 100, 1, " points")
        if metric in SHARES
        else _with_interval(average.gap, 1, 3, " nats")
    )
    return f"{sentence}. There is no gap to close: the experts' lead over {start}, is {gap}."


def _unit(metric: Metric) -> str:
    """Returns the unit of a score as tables show it, for a text."""
    if metric in ("pearson", "spearman", "r2", "of_each_task"):
        return ""
    return "%" if metric in SHARES else " nats per token"


def in_words(score: float, metric: str) -> str:
    """Returns a score as tables show it."""
    return f"{100 * score:.1f}" if metric in SHARES else f"{score:.3f}"


def scores(row: Row) -> list[float]:
    """Returns the scores of a row: one per task, then the average."""
    return [*row.tasks.values(), row.average]


def scores_in_words(row: Row) -> list[str]:
    """Returns the scores of a row as tables show them."""
    return [in_words(score, row.metric) for score in scores(row)]


def best_single(rows: Sequence[Row]) -> list[float]:
    """Returns the best score in each column, the average last, among single models.

    The experts are one model per task, and so no rivals of a merge.
    """
    best = max if rows[0].metric in SHARES else min
    columns = zip(*(scores(row) for row in rows if row.kind != "experts"), strict=True)
    return [best(column) for column in columns]


def percentage(estimate: Estimate | None, digits: int) -> str | None:
    """Returns a share in percent as tables show it."""
    return None if estimate is None else f"{100 * estimate.value:.{digits}f}%"


def interval_in_percent(estimate: Estimate | None, digits: int) -> str | None:
    """Returns the interval of a share in percent as tables show it; None where it has none."""
    if estimate is None or estimate.interval is None:
        return None
    return " to ".join(f"{100 * end:.{digits}f}" for end in estimate.interval) + "%"


def _with_interval(estimate: Estimate, factor: float, digits: int, unit: str) -> str:
    """Returns a number with its interval, where that is known."""
    words = f"{factor * estimate.value:.{digits}f}{unit}"
    if estimate.interval is None:
        return words
    low, high = (f"{factor * end:.{digits}f}" for end in estimate.interval)
    return f"{words} (95% interval {low} to {high})"
