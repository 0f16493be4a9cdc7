import numpy as np
import pytest
from rich.console import Console

from adamerge_jax.report.results import best_single, outcome_in_words, results_table
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.rows import ExampleScores, Row

ACCURACY = [
    Row("base", {"a": 0.2, "b": 0.9}),
    Row("experts (one model each)", {"a": 0.9, "b": 0.7}, kind="experts"),
    Row("task arithmetic (0.3)", {"a": 0.5, "b": 0.7}),
    Row("learned (row)", {"a": 0.8, "b": 0.6}, kind="learned"),
]
LOSS = [
    Row("experts (one model each)", {"a": 1.0, "b": 2.0}, "loss", "experts"),
    Row("task arithmetic (0.3) after interference steps", {"a": 3.0, "b": 2.5}, "loss"),
    Row("learned (row)", {"a": 1.5, "b": 3.0}, "loss", "learned"),
]


def right(method: str, kind: str, shares: dict[str, float], examples: int = 400) -> Row:
    """A row whose first examples of each task are right."""
    ones = np.ones(examples, np.int32)
    scores = {
        task: ExampleScores((np.arange(examples) < share * examples).astype(np.float32), ones)
        for task, share in shares.items()
    }
    return Row.of_examples(method, scores, "accuracy", kind)


def words(rows: list[Row], **options) -> str:
    return outcome_in_words(measure_outcome(rows), rows[-1].metric, **options)


def test_the_best_single_model_is_no_expert():
    assert best_single(ACCURACY) == pytest.approx([0.8, 0.9, 0.7])
    assert best_single(LOSS) == pytest.approx([1.5, 2.5, 2.25])


def test_the_outcome_in_a_sentence():
    # By hand: 0.7 of 0.8; 0.1 of 0.2.
    assert words(ACCURACY) == (
        "The merge reaches 70.0% on average: 87.5% of the experts' average. It closes 50% of the "
        "gap from task arithmetic (0.3), the best row without learning, to the experts."
    )
    # 2.25 of 1.5; 0.5 of 1.25.
    assert words(LOSS) == (
        "The merge reaches 2.250 nats per token on average: 150.0% of the experts' average (less "
        "is better). It closes 40% of the gap from task arithmetic (0.3) after interference steps, "
        "the best row without learning, to the experts."
    )


def test_rows_that_are_missing():
    reached = "The merge reaches 70.0% on average"
    assert words(ACCURACY[-1:]) == words(ACCURACY[2:]) == f"{reached}."
    assert words(ACCURACY[1::2]) == f"{reached}: 87.5% of the experts' average."


def test_no_gap_to_close():
    rows = [ACCURACY[0], ACCURACY[1]._replace(tasks={"a": 0.4, "b": 0.7}), ACCURACY[3]]
    assert words(rows).endswith(
        "There is no gap to close: the experts' lead over base, the best row without learning, is "
        "0.0 points."
    )
    rows = [
        right("base", "baseline", {"a": 0.90}),
        right("experts", "experts", {"a": 0.905}),
        right("learned", "learned", {"a": 0.91}),
    ]
    # The experts are right on two more of 400 examples. The merge is right on four more: 200%.
    assert "no gap to close" in words(rows)
    assert "is 0.5 points (95% interval 0.0 to 1.2)" in words(rows)
    assert "100.6% (95% interval 100.0 to 101.4) of the experts' average" in words(rows)


def test_intervals_are_given():
    rows = [
        right("base", "baseline", {"a": 0.2, "b": 0.4}),
        right("experts", "experts", {"a": 0.9, "b": 0.9}),
        right("learned", "learned", {"a": 0.8, "b": 0.8}),
    ]
    assert "It closes 83% (95% interval 80 to 87) of the gap from base" in words(rows)


def test_too_few_examples_for_an_interval():
    shares = [("base", "baseline", 0.0), ("experts", "experts", 1.0), ("learned", "learned", 1.0)]
    for size in (1, 9):
        rows = [right(method, kind, {"a": share}, size) for method, kind, share in shares]
        assert f"so few test examples: a has {size}, and 10 are needed" in words(rows)
    rows = [right(method, kind, {"a": share}, 10) for method, kind, share in shares]
    assert "closes 100% (95% interval 100 to 100)" in words(rows)


def test_a_merge_without_a_finite_score():
    rows = [*LOSS[:2], LOSS[2]._replace(tasks={"a": float("nan"), "b": 1.0})]
    assert words(rows) == "The merge has no finite score."


def test_names_in_the_table_are_text():
    hostile = "[red]a[/red]\x1b[2J\nb"
    rows = [Row(hostile, {hostile: 0.5}), Row("learned (row)", {hostile: 0.6}, kind="learned")]
    for markup in (False, True):
        console = Console(width=120, markup=markup, record=True, color_system=None)
        with console.capture() as captured:
            console.print(results_table(rows))
        assert captured.get().count("[red]a[/red] [2J b") == 2
        assert "\x1b" not in captured.get()
