"""The table of a comparison: means over seeds, standing, and how it is written."""

import io

import numpy as np
import pytest
from rich.console import Console

from adamerge_jax.comparison.measure import Cost, Measured
from adamerge_jax.comparison.picture import draw_comparison
from adamerge_jax.comparison.summary import summarise
from adamerge_jax.comparison.tables import as_markdown, score_table, standing_table
from adamerge_jax.runs.rows import ExampleScores, Row

COST = Cost(2.0, 1.0, 3 * 10**9, "cpu", 5, 12)


def row(name: str, accuracy: float, kind: str = "baseline", metric: str = "accuracy") -> Row:
    """A row of one task of 40 examples, of which a part is right; as losses, of two tokens each."""
    values = (np.arange(40) < 40 * accuracy).astype(np.float32)
    counts = np.full(40, 1 if metric == "accuracy" else 2)
    if metric == "loss":
        values = np.full(40, 2 * accuracy, np.float32)
    return Row.of_examples(name, {"a|b": ExampleScores(values, counts)}, metric, kind)


def measured(*rows: Row, seconds: float = 2.0) -> Measured:
    return Measured(list(rows), COST._replace(seconds=seconds))


def comparison_of(metric: str = "accuracy"):
    scale = 1 if metric == "accuracy" else -1

    def scored(name, accuracy, kind="baseline"):
        return row(name, accuracy if scale > 0 else 2 - accuracy, kind, metric)

    return summarise(
        measured(scored("base", 0.3), scored("experts", 0.9, "experts")),
        {
            "ties": {0: measured(scored("ties", 0.5))},
            "pcb": {0: measured(scored("pcb", 0.4))},
            "recipe": {
                0: measured(scored("recipe", 0.7, "learned"), seconds=1.0),
                1: measured(scored("recipe", 0.8, "learned"), seconds=3.0),
            },
        },
        {"knots": "experts are no adapters"},
    )


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_means_and_standing(metric):
    comparison = comparison_of(metric)
    assert [m.name for m in comparison.methods] == ["base", "experts", "recipe", "ties", "pcb"]
    assert comparison.reference == "ties"
    learned = comparison.methods[2]
    expected = 0.75 if metric == "accuracy" else 1.25
    assert learned.average.mean == pytest.approx(expected)
    assert learned.average.deviation == pytest.approx(0.1 / np.sqrt(2), rel=1e-5)
    assert learned.standing.closed.value == pytest.approx(0.25 / 0.4)
    assert learned.standing.share.value == pytest.approx(
        0.75 / 0.9 if metric == "accuracy" else 1.25 / 1.1
    )
    assert (learned.seeds, learned.seconds, learned.steps) == ((0, 1), 2.0, 5)
    ties = comparison.methods[3]
    assert ties.average.deviation is None
    assert ties.standing.closed is None
    if metric == "accuracy":
        low, high = learned.standing.score.interval
        assert low < 0.75 < high


def test_what_learning_gains_beyond_heads():
    comparison = summarise(
        measured(row("base", 0.3), row("experts", 0.9, "experts")),
        {
            "ties": {0: measured(row("ties", 0.5))},
            "base, heads refitted": {0: measured(row("base, heads refitted", 0.6, "heads"))},
            "recipe": {0: measured(row("recipe", 0.75, "learned"))},
        },
        {},
    )
    methods = {method.name: method for method in comparison.methods}
    assert comparison.reference == "ties"
    assert comparison.reference_with_heads == "base, heads refitted"
    assert methods["recipe"].standing.closed.value == pytest.approx(0.25 / 0.4)
    assert methods["recipe"].beyond_heads.value == pytest.approx(0.15 / 0.3)
    heads = methods["base, heads refitted"]
    assert heads.standing.closed.value == pytest.approx(0.1 / 0.4)
    assert heads.beyond_heads is None
    page = as_markdown(comparison, "title")
    assert "| gap closed | beyond heads |" in page
    assert "Beyond heads: that from base, heads refitted" in page


def test_tables_say_it_all():
    comparison = comparison_of()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(score_table(comparison))
    console.print(standing_table(comparison))
    text = console.export_text()
    assert "75.0 ± 7.1" in text
    assert "The gap is that from ties" in text
    page = as_markdown(comparison, "two | bars")
    header = "| method | average | 95% interval | of experts | gap closed |"
    assert header in page
    assert "| recipe | 75.0 ± 7.1 |" in page
    assert "- knots has no row: experts are no adapters" in page
    assert "a|b" not in page  # a bar would end the cell


def test_a_row_without_a_finite_score_is_last():
    bad = measured(row("worst", 0.0)._replace(tasks={"a|b": float("nan")}))
    references = measured(row("base", 0.3), row("experts", 0.9, "experts"))
    comparison = summarise(
        references, {"worst": {0: bad}, "ties": {0: measured(row("t", 0.5))}}, {}
    )
    assert [m.name for m in comparison.methods][-1] == "worst"
    assert comparison.methods[-1].standing is None
    assert "| worst | nan |" in as_markdown(comparison, "title")
    draw_comparison(comparison)
    comparison.as_json()


def test_the_picture_has_a_line_per_method():
    figure = draw_comparison(comparison_of())
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["recipe", "ties", "pcb"]
