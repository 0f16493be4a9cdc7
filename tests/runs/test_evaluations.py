import math
from pathlib import Path

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.evaluations import (
    Evaluation,
    append_evaluation,
    discard_half_line,
    read_evaluations,
)


@pytest.fixture
def log(tmp_path: Path) -> list[Evaluation]:
    generator = np.random.default_rng(0)
    return [
        Evaluation(
            number,
            "search",
            {"all": generator.normal(size=3).tolist()},
            generator.normal(),
            {"a": generator.normal()},
            0.25,
        )
        for number in range(1, 20)
    ]


@pytest.fixture
def file(log: list[Evaluation], tmp_path: Path) -> Path:
    for evaluation in log:
        append_evaluation(tmp_path / "evaluations.jsonl", evaluation)
    return tmp_path / "evaluations.jsonl"


def test_numbers_are_read_bit_for_bit(file: Path, log: list[Evaluation]):
    assert read_evaluations(file) == log


def test_scores_that_are_not_finite_are_null(tmp_path: Path):
    file = tmp_path / "evaluations.jsonl"
    append_evaluation(file, Evaluation(1, "single", {}, math.inf, {"a": math.nan}, 1.0))
    assert '"score": null' in file.read_text() and "NaN" not in file.read_text()
    (evaluation,) = read_evaluations(file)
    assert math.isnan(evaluation.score) and math.isnan(evaluation.tasks["a"])


def test_a_half_line_does_not_count(file: Path, log: list[Evaluation]):
    content = file.read_bytes()
    for cut in (content[:-1], content[:-40], content[: content.rfind(b"\n", 0, -1) + 2]):
        file.write_bytes(cut)
        assert read_evaluations(file) == log[:-1]
    discard_half_line(file)
    append_evaluation(file, log[-1])
    assert read_evaluations(file) == log


def test_no_log_has_no_evaluations(tmp_path: Path):
    assert read_evaluations(tmp_path / "none") == []
    discard_half_line(tmp_path / "none")


@pytest.mark.parametrize(
    "line", ["{}", "nonsense", '{"number": 2}', "[1]", '{"number": "x", "phase": 5}']
)
def test_damaged_lines_are_refused(file: Path, line: str):
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"evaluations.jsonl, line 20: .*expected the JSON"):
        read_evaluations(file)


def test_a_missing_line_is_noticed(file: Path):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(InputError, match="line 4: it is number 5"):
        read_evaluations(file)
