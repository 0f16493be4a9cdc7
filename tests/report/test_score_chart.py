"""Where the chart of scores puts methods and intervals."""

import math

import pytest

from adamerge_jax.report.score_chart import score_panels, wilson_interval
from adamerge_jax.runs.outcome import Estimate, Outcome, Standing
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import Row


def results(metric="accuracy", **scores: tuple[float, float]) -> Results:
    kinds = {"base": "baseline", "experts": "experts", "merge": "learned"}
    rows = [
        Row(method, dict(zip(("cat", "dog"), values, strict=True)), metric, kinds[method])
        for method, values in scores.items()
    ]
    standing = Standing(Estimate(0.8, (0.7, 0.9)))
    sizes = {"cat": 100, "dog": 400}
    return Results(rows, Outcome({"cat": standing, "dog": standing}, standing, examples=sizes))


def test_wilsons_interval():
    # Newcombe, Statistics in Medicine, 1998: 81 of 263, and 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_panels_have_the_average_first_and_intervals_around_scores():
    panels = score_panels(results(base=(0.4, 0.5), experts=(0.9, 0.95), merge=(0.8, 0.9)))
    assert [panel.title for panel in panels] == ["average", "cat", "dog"]
    assert [panel.examples for panel in panels] == [None, 100, 400]
    for panel in panels:
        base, experts, merge = panel.bars
        assert 0 < base.place < merge.place < experts.place == panel.experts < 100
        assert all(bar.low < bar.place < bar.high for bar in panel.bars)
        assert len(panel.ticks) >= 2
    cat, dog = (panel.bars[2] for panel in panels[1:])
    assert cat.words == "merge: 80.0, 95% interval 71.1 to 86.7"
    # Four times the examples, half of the interval.
    assert dog.words == "merge: 90.0, 95% interval 86.7 to 92.6"
    assert panels[0].bars[2].words == "merge: 85.0, 95% interval 80.8 to 89.2"


def test_of_losses_only_the_merge_has_an_interval():
    panels = score_panels(results("loss", base=(2.0, 3.0), merge=(0.8, 0.8)))
    assert [bar.low is None for bar in panels[1].bars] == [True, False]
    assert panels[0].experts is None


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e300, -1e300])
def test_scores_that_cannot_be_drawn_leave_the_others_where_they_are(odd):
    (_, panel, _) = score_panels(results("loss", base=(odd, 1.0), merge=(0.8, 0.9)))
    base, merge = panel.bars
    assert base.place is None and 0 <= merge.place <= 100


def test_one_score_alone_is_on_the_axis():
    (_, panel, _) = score_panels(Results(results(merge=(0.0, 0.0)).rows))
    assert 0 <= panel.bars[0].place <= 100
