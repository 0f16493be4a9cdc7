"""What nobody foresaw ends in one line, too, which names what was in hand; a traceback is kept."""

import errno
import resource
import tempfile
from pathlib import Path

import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.cli.coefficients_commands import Inspect
from adamerge_jax.errors import InputError, file_in_hand, in_hand, readable
from adamerge_jax.pipeline import run_learn
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import random_coefficients, write_recipe


def ended(capfd, *arguments: str) -> tuple[int, str]:
    """Returns the exit status of a command and its one line of error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    (line,) = capfd.readouterr().err.splitlines()
    return caught.value.code, line


def raising(error: BaseException):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (OSError(errno.ENOSPC, "", "runs/x"), "runs/x: No space left on device; free some", 2),
        (OSError(errno.EROFS, "", "runs/x"), "runs/x: Read-only file system; it is on a disk", 2),
        (OSError(errno.EFBIG, "No", None), "c.safetensors: File too large; files are limited", 2),
        (OSError(errno.EDQUOT, "", "x"), "x: Disk quota exceeded; your quota is used up", 2),
        (
            PermissionError(errno.EACCES, "", b"x"),
            "x: Permission denied; change its permissions",
            2,
        ),
        (OSError(errno.ETXTBSY, "", "x"), "x: Text file busy; the traceback", 2),
        (ValueError("write: No space left on device"), "c.safetensors: write: No space left", 2),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "c.safetensors is no text in UTF-8", 2),
        (RecursionError("maximum"), "c.safetensors is nested too deeply to be read", 2),
        (MemoryError(), "c.safetensors: out of memory; `adamerge plan`", 2),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "c.safetensors: out of memory", 2),
        (KeyError("shapes"), "c.safetensors cannot be used (KeyError: 'shapes')", 2),
        (ZeroDivisionError("by\nzero\x1b"), "cannot be used (ZeroDivisionError: by zero?)", 2),
    ],
)
def test_what_a_file_has_done(error, reason, status, monkeypatch, temporary, capfd):
    monkeypatch.setattr("adamerge_jax.coefficients.file.Coefficients.load", raising(error))
    assert ended(capfd, "inspect", "c.safetensors")[0] == status
    status_again, line = ended(capfd, "inspect", "c.safetensors")
    assert status_again == status
    assert line.startswith("error: ")
    assert reason in line
    traceback = Path(line.rpartition("the traceback is in ")[2])
    assert traceback.parent == temporary
    assert type(error).__name__ in traceback.read_text()
    assert "file in hand: c.safetensors" in traceback.read_text()
    # Each has its own.
    assert len(list(temporary.iterdir())) == 2


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), TypeError(), AssertionError(), UnicodeError("x")]
)
def test_what_is_our_own_fault(error, monkeypatch, capfd):
    monkeypatch.setattr(Inspect, "run", raising(error))
    status, line = ended(capfd, "inspect", "c.safetensors")
    assert status == 1
    assert f"adamerge failed ({type(error).__name__}" in line
    assert "please report it; the traceback is in " in line


def test_the_run_folder_keeps_the_traceback(text_recipe, tmp_path, monkeypatch, temporary, capfd):
    monkeypatch.setattr(run_learn, "learn_coefficients", raising(KeyError("step")))
    recipe, out = write_recipe(tmp_path, text_recipe), tmp_path / "out"
    status, line = ended(capfd, "learn", str(recipe), "--out", str(out), "--quiet")
    assert status == 1
    assert line.endswith(f"the traceback is in {out / 'traceback.txt'}")
    assert "KeyError: 'step'" in (out / "traceback.txt").read_text()
    assert not list(temporary.iterdir())


def test_a_folder_that_is_no_run_s_stays_as_it_is(text_recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_learn, "open_workspace", raising(KeyError("step")))
    recipe, out = write_recipe(tmp_path, text_recipe), tmp_path / "out"
    status, _ = ended(capfd, "learn", str(recipe), "--out", str(out))
    assert status == 1
    assert not out.exists()


def test_nowhere_to_write_to(monkeypatch, capfd):
    monkeypatch.setattr(Inspect, "run", raising(OSError(errno.ENOSPC, "", "x")))
    monkeypatch.setattr(tempfile, "mkstemp", raising(OSError(errno.ENOSPC, "")))
    assert ended(capfd, "inspect", "c.safetensors")[1].endswith("; the traceback is lost")


def test_the_innermost_file_counts():
    with pytest.raises(KeyError) as caught, in_hand("folder"), in_hand("file"):
        raise KeyError
    assert file_in_hand(caught.value) == "file"


@pytest.mark.parametrize("file", ["none.safetensors", "x" * 300, "y" * 5000])
def test_what_needs_no_traceback_has_none(file, temporary, capfd):
    status, line = ended(capfd, "inspect", file)
    assert status == 2
    assert "traceback" not in line
    assert not list(temporary.iterdir())


def test_messages_are_one_line_for_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(Inspect, "run", raising(InputError("a\nb \x1b[31m \u202e é")))
    assert ended(capfd, "inspect", "c") == (2, r"error: a\nb \x1b[31m \u202e é")
    long = readable(f"start {'x' * 5000} end")
    assert len(long) < 1100
    assert long.startswith("start x")
    assert long.endswith("x end")


def test_a_limit_of_files(text_recipe, tmp_path, capfd):
    """The system's own refusal, in the middle of the weights: one line, and nothing is left."""
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(open_models(parse_recipe(text_recipe), tmp_path)).save(file)
    recipe, out = write_recipe(tmp_path, text_recipe), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        status, line = ended(
            capfd, "fold", str(recipe), str(file), "--out", str(out), "--export.no-orbax"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert line.startswith(f"error: {out / 'checkpoint'}: File too large; files are limited here")
    assert not list(out.rglob("*"))
