"""Counts of what a run has done, on a terminal and in a log file."""

import io
import re
import time

from rich.console import Console

from adamerge_jax.runs.counting import CountLines, Tally, count_on


def test_lines_with_the_time_left():
    lines = []
    with CountLines(lines.append, seconds=0)("answers", 30) as on_count:
        on_count(10)
        on_count(30)
    assert lines[0] == "answers: 0 of 30"
    assert re.fullmatch(r"answers: 10 of 30, \d:\d\d:\d\d left", lines[1])
    assert len(lines) == 2  # nothing is left


def test_what_is_quick_has_no_lines():
    lines = []
    count = CountLines(lines.append, seconds=1000)
    for _ in range(3):
        with count("answers", 2) as on_count:
            on_count(1)
    assert not lines


def test_lines_have_no_more_than_one_in_the_time(monkeypatch):
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr("adamerge_jax.runs.counting.time.perf_counter", lambda: next(seconds))
    lines = []
    with CountLines(lines.append)("answers", 100) as on_count:
        for done in range(1, 10):
            on_count(done)
    assert [line.partition(",")[0] for line in lines] == [
        f"answers: {done} of 100" for done in (1, 4, 7)
    ]


def test_a_terminal_has_a_bar_below_other_lines():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, color_system=None)
    with console.status("evaluating"), count_on(console)("answers on [law]", 30) as on_count:
        on_count(15)
        time.sleep(0.3)  # drawn ten times a second
    assert re.search(r"answers on \[law\].*15/30.*left", shown.getvalue())


def test_a_log_file_has_lines_where_it_takes_long(monkeypatch):
    monkeypatch.setattr("adamerge_jax.runs.counting.SECONDS", 0)
    shown = io.StringIO()
    with count_on(Console(file=shown, width=40))("answers", 30) as on_count:
        on_count(15)
    assert re.fullmatch(r"answers: 0 of 30\nanswers: 15 of 30, 0:00:0\d left\n", shown.getvalue())


def test_what_is_done_in_several_places_adds_up():
    lines = []
    tally = Tally()
    tally.add(5)  # nobody looks
    with tally.shown(CountLines(lines.append, seconds=0), "examples", 10):
        tally.add(4)
        tally.add(4)
        with tally.shown(CountLines(lines.append, seconds=0), "others", 3):
            tally.add(1)
        tally.add(1)
        tally.add(4)  # a batch that is filled up
    assert [line.partition(",")[0] for line in lines] == [
        *("examples: 0 of 10", "examples: 4 of 10", "examples: 8 of 10"),
        *("others: 0 of 3", "others: 1 of 3", "examples: 9 of 10"),
    ]
