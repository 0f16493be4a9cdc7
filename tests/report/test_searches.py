"""The pages and pictures of searches and fronts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adamerge_jax.coefficients.file import BY_SCORE
from adamerge_jax.report.front import _apart, draw_front
from adamerge_jax.report.page import write_page
from adamerge_jax.report.score_curve import draw_scores
from adamerge_jax.runs.front import Front, FrontPoint
from tests.report.hostile import HOSTILE
from tests.report.saved_runs import COEFFICIENTS, EVALUATIONS, write_run
from tests.report.test_page import Page

FINITE = [evaluation for evaluation in EVALUATIONS if np.isfinite(evaluation.score)]


def page(folder: Path) -> Page:
    return Page(write_page(folder))


@pytest.fixture(scope="module")
def search_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("search"), "results", "record", "evaluations")
    searched = dataclasses.replace(COEFFICIENTS, objective=f"{BY_SCORE}accuracy", step=4)
    searched.save(folder / "coefficients.safetensors")
    return folder


def test_the_page_of_a_search(search_run: Path):
    shown = page(search_run)
    assert not {"curves", "disagreement", "front", "missing"} & set(shown.sections)
    text = " ".join(shown.sections["search"].split())
    assert "started, has 0.65; the best merge, of evaluation 4, has 0.8" in text
    assert "1 merges had no finite score" in text
    assert "found by a search for the best accuracy" in shown.sections["coefficients"]
    assert "4 merges were scored by" in shown.source
    (curve,) = [image for image in shown.images if "best single" in image["alt"]]
    assert "0.65" in curve["alt"] and "evaluation 4, 0.8" in curve["alt"]


def test_the_page_of_a_search_that_was_interrupted(tmp_path: Path):
    shown = page(write_run(tmp_path, "evaluations"))
    assert "No result: the run has not come to its end." in shown.sections["missing"]
    assert "learning" not in shown.sections["missing"]
    assert "search" in shown.sections


def test_the_page_of_a_front(tmp_path: Path):
    folder = write_run(tmp_path, "results", "evaluations", "front")
    shown = page(folder)
    assert not {"curves", "disagreement", "coefficients", "search"} & set(shown.sections)
    scores = shown.tables["accuracy (%) on the validation data"]
    assert scores["point"] == ["cat", "dog", "average"]
    assert scores["01"] == ["90.0", "50.0", "70.0"]
    assert scores["02 (best on average)"] == ["85.0", "75.0", "80.0"]
    assert scores["one coefficient, 0.5"] == ["60.0", "70.0", "65.0"]
    assert scores["experts"] == ["95.0", "90.0", "92.5"]
    assert shown.tables["Coefficient of each expert"]["03"] == ["0.40", "0.40"]
    assert shown.tables["The surfaces' errors (%)"]["cat"] == ["1.2", "3.4", "20.0"]
    with Image.open(folder / "front.png") as image:
        assert image.format == "PNG" and min(image.size) > 400


def of_tasks(tasks: list[str], score: str = "accuracy", maximise: bool = True) -> Front:
    generator = np.random.default_rng(len(tasks))

    def drawn() -> dict[str, float]:
        return dict(zip(tasks, generator.uniform(0.2, 0.9, len(tasks)).tolist(), strict=True))

    points = [FrontPoint(f"{at}.safetensors", drawn(), drawn(), drawn(), {}) for at in range(6)]
    return Front(score, maximise, points, drawn(), [(0.3, drawn()), (0.5, drawn())], [drawn()], {})


@pytest.mark.parametrize(
    ("tasks", "panels"), [(["a", "b"], 1), (["a", "b", "c"], 3), (["a", "b", "c", "d"], 1)]
)
@pytest.mark.parametrize("maximise", [True, False])
def test_pictures_have_a_panel_for_each_pair_or_all_tasks_in_one(tasks, panels, maximise):
    figure = draw_front(of_tasks(tasks, "accuracy" if maximise else "loss", maximise))
    axes = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(axes) == panels
    for panel in axes:
        numbers = {text.get_text() for text in panel.texts}
        assert numbers == set("123456")
    unit = " (%)" if maximise else ""
    assert (
        axes[0].get_ylabel()
        == {2: "b", 3: "b", 4: "accuracy" if maximise else "loss"}[len(tasks)] + unit
    )


@pytest.mark.parametrize("maximise", [True, False])
def test_the_step_line_is_the_front_of_the_pair(maximise: bool):
    """No merge of the picture lies beyond it, and it is made of merges."""
    front = of_tasks(["a", "b"], maximise=maximise)
    (line,) = [line for line in draw_front(front).axes[0].lines if line.get_label() == "front"]
    corners = np.column_stack([line.get_xdata(), line.get_ydata()])
    merges = [point.scores for point in front.points] + front.others
    merges += [scores for _, scores in front.singles]
    sign = 1 if maximise else -1
    values = sign * 100 * np.array([[scores["a"], scores["b"]] for scores in merges])
    for corner in sign * corners:
        assert not (values > corner + 1e-9).all(1).any()
        assert (np.abs(values - corner) < 1e-9).all(1).any()


def test_names_of_strangers_do_nothing_in_pictures(tmp_path: Path):
    names = [HOSTILE[0], "$\\frac{", "c"]
    draw_front(of_tasks(names)).savefig(tmp_path / "pairs.png")
    draw_front(of_tasks([*names, "d"])).savefig(tmp_path / "lines.png")
    draw_scores(FINITE, "score $x^", True)


def test_the_curve_of_a_loss_falls():
    figure = draw_scores(FINITE, "loss", maximise=False)
    (steps,) = [line for line in figure.axes[0].lines if line.get_label() == "best so far"]
    assert list(steps.get_ydata()) == [0.55, 0.55, 0.55]
    (steps,) = [
        line
        for line in draw_scores(FINITE, "accuracy", True).axes[0].lines
        if line.get_label() == "best so far"
    ]
    assert list(steps.get_ydata()) == [0.55, 0.65, 0.8]


def test_labels_are_put_apart_in_their_order():
    heights = np.array([0.5, 0.1, 0.5, 0.52, 0.9])
    placed = _apart(heights, 0.1)
    assert (np.diff(np.sort(placed)) >= 0.1 - 1e-9).all()
    assert (np.argsort(placed, kind="stable") == np.argsort(heights, kind="stable")).all()
