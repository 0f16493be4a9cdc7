import os
import sys
import time
from pathlib import Path

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.search.score_command import run_command, split_command


def run(code: str, timeout: float = 60, folder: Path = Path("merge")) -> float:
    """The score that a Python program prints."""
    return run_command([sys.executable, "-c", code, "{checkpoint}"], folder, timeout)


def failure(code: str, timeout: float = 60) -> str:
    with pytest.raises(InputError) as caught:
        run(code, timeout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("0.25", 0.25),
        ("accuracy: 61.5%", 61.5),
        ("step 3 of 10\nloss = -1.5e-3\n\n", -0.0015),
        ("|hellaswag|1|acc|0.4321|", 0.4321),
        ('{"acc": .5, "name": "v2.1.0-beta"}', 0.5),
        ("the score is 7.", 7.0),
        ("0.5 in 3s, lm-eval 0.4.9", 0.5),
    ],
)
def test_the_last_number_is_the_score(printed: str, score: float):
    assert run(f"print({printed!r})") == score


def test_the_checkpoint_is_one_word_whatever_it_is_called(tmp_path: Path):
    folder = tmp_path / "a b; echo 5 $HOME"
    assert run(f"import sys; print(int(sys.argv[1] == {str(folder)!r}))", folder=folder) == 1


def test_standard_input_is_empty():
    assert run("import sys; print(len(sys.stdin.read()))") == 0


def test_a_failure_is_told_with_its_status_and_last_line():
    said = failure("import sys; print(0.5); print('no GPU\\x1b[31m', file=sys.stderr); sys.exit(3)")
    assert "ended with exit status 3" in said and "no GPU?[31m" in said
    assert "signal 9" in failure("import os; os.kill(os.getpid(), 9)")


def test_no_number_is_a_failure():
    assert "printed no number" in failure("print('done', 'v1')")
    assert "its last line: 'Killed'" in failure("import sys; print('Killed', file=sys.stderr)")


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert "has not ended after 2 seconds" in failure(code, timeout=2)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return  # ended, and nobody has looked yet
        time.sleep(0.1)
    pytest.fail("the child still runs")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("lm_eval --model hf", "does not say where the checkpoint goes; put {checkpoint}"),
        ("{checkpoint}", "does not say where the checkpoint goes"),
        ("'python {checkpoint}", "No closing quotation"),
        ("", "does not say where the checkpoint goes"),
        ("no-such-program {checkpoint}", "there is no program 'no-such-program'"),
    ],
)
def test_commands_that_cannot_be_run(command: str, words: str):
    with pytest.raises(InputError, match="--score-command: ") as caught:
        split_command(command)
    assert words in str(caught.value)


def test_words_are_those_of_a_shell():
    words = split_command(f"{sys.executable} -c 'print(1)' --model=hf,path={{checkpoint}}")
    assert words == [sys.executable, "-c", "print(1)", "--model=hf,path={checkpoint}"]
