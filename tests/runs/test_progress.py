"""The progress of learning where there is no terminal."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from adamerge_jax.learning.held_out import HeldOutMetrics
from adamerge_jax.learning.loop import Progress
from adamerge_jax.runs import progress as module
from adamerge_jax.runs.progress import show_progress


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1e9, 1)])
def test_slow_steps_have_lines_between_evaluations(seconds, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", seconds)
    written = io.StringIO()
    metrics = tmp_path / "metrics.jsonl"
    held_out = HeldOutMetrics(np.ones(2), np.full(2, 0.5), np.full(2, 0.1), np.full(2, 10))
    with show_progress(["a", "b"], 9, metrics, Console(file=written, width=120)) as on_step:
        on_step(Progress(0, None, held_out, 0.1))
        for step in (1, 2):
            on_step(Progress(step, np.array([1.0, 0.5]), None, 0.1))
    first, *others = written.getvalue().splitlines()
    assert first == "step 0/9: held-out loss 2.0000, agreement 50.0%"
    assert len(others) == lines - 1
    for number, line in enumerate(others, start=1):
        assert re.fullmatch(rf"step {number}/9: loss 1\.5000, 0:00:0\d left", line)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1, 2]
