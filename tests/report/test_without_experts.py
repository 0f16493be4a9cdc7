"""The report and `inspect` show what each task loses without each expert."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adamerge_jax.cli import main as cli
from adamerge_jax.report.page import write_page
from adamerge_jax.report.without_experts import Losses, losses_grid, losses_in_words
from adamerge_jax.runs.rows import Metric, Row
from adamerge_jax.runs.without_experts import write_without_experts
from tests.report.saved_runs import TASKS, write_run


def losses(metric: Metric, merge: list[float], without: dict[str, list[float]]) -> Losses:
    def row(name: str, values: list[float]) -> Row:
        return Row(name, dict(zip(TASKS, values, strict=True)), metric, "learned")

    return Losses.of(row("learned", merge), [row(name, own) for name, own in without.items()])


SHARES = losses("accuracy", [0.8, 0.6], {"cat": [0.3, 0.6], "dog": [0.75, 0.2]})
NONE = "\N{EN DASH}"
NATS = losses("loss", [1.0, 2.0], {"cat": [3.0, 1.5], "dog": [1.25, math.nan]})


def test_changes_are_points_or_nats():
    np.testing.assert_allclose(SHARES.changes, [[-50, 0, -25], [-5, -40, -22.5]])
    np.testing.assert_allclose(NATS.changes, [[2, -0.5, 0.75], [0.25, math.nan, math.nan]])
    assert SHARES.tasks == [*TASKS, "average"]
    texts = [[cell.text for cell in line.cells] for line in losses_grid(NATS).lines]
    assert texts == [["+2.000", "-0.500", "+0.750"], ["+0.250", NONE, NONE]]
    assert "nats" in losses_grid(NATS).caption and "points" in losses_grid(SHARES).caption


def lightness(style: str) -> float:
    return sum(int(style.removeprefix("background:#")[i : i + 2], 16) for i in (0, 2, 4))


def test_orange_is_worse_whatever_the_metric():
    of_shares = [cell.style for cell in losses_grid(SHARES).lines[0].cells]
    of_nats = [cell.style for cell in losses_grid(NATS).lines[0].cells]
    assert of_shares[0] == of_nats[0]  # the worst of each
    assert lightness(of_shares[0]) < lightness(of_shares[2]) < lightness(of_shares[1])
    assert of_nats[1] != of_nats[0]
    assert losses_grid(NATS).lines[1].cells[1].style == ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (SHARES, "expert is cat: -5.0 without dog."),
        (NATS, "expert is cat: +0.250 without dog."),
        (losses("accuracy", [0.8, 0.6], {"cat": [0.1, 0.7]}), "No task loses"),
    ],
)
def test_words_name_the_other_tasks_expert(case: Losses, words: str):
    assert words in losses_in_words(case)


def test_report_and_inspect_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path, "coefficients", "results")
    assert "Without each expert" not in write_page(folder).read_text()
    rows = [Row(task, {"cat": 0.3, "dog": 0.55}, kind="learned") for task in TASKS]
    write_without_experts(rows, folder / "without_experts.json")
    page = write_page(folder).read_text()
    assert 'id="without"' in page and 'href="#without"' in page
    assert ">-50.0</td>" in page and ">without cat</th>" in page
    cli.main(["inspect", str(folder)])
    printed = capsys.readouterr().out
    assert "-50.0" in printed and "-5.0" in printed and "-27.5" in printed


def test_inspect_draws_the_map(tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn_figures):
    folder = write_run(tmp_path / "run", "coefficients")
    with drawn_figures():
        cli.main(["inspect", str(folder), "--out", str(tmp_path / "map.png")])
    assert f"map of coefficients {tmp_path / 'map.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", str(folder), "--out", str(tmp_path / "map.gif")])
    assert stopped.value.code == 2
    assert "expected a .png file" in capsys.readouterr().err
