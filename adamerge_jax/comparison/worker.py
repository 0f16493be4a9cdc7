"""The process that measures one contender, and how it is started.

Its memory is its own, and what it runs out of is not that of the others. It gets a line of JSON on
standard input and writes the row's file; what it prints is progress. It ends when standard input
does, so that it does not outlive the process that started it.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from adamerge_jax.comparison.contenders import Contender
from adamerge_jax.comparison.measure import Report, measure
from adamerge_jax.comparison.saved import save
from adamerge_jax.errors import InputError, NonFiniteObjectiveError, readable
from adamerge_jax.registry import allow_code


class Job(NamedTuple):
    """The order to measure one contender.

    Attributes:
        contender: The contender.
        data_seed: The seed that draws the test examples.
        root: Folder that relative paths of the recipe start from.
        file: The file of the row.
        state: The folder of the state of learning; it is removed when the row is there.
        allow_code: True if functions of the user's own may be imported.
    """

    contender: Contender
    data_seed: int
    root: Path
    file: Path
    state: Path
    allow_code: bool = False


class JobFailed(Exception):
    """The end of a process without a row.

    Attributes:
        is_refused: True if the contender does not go with the models or the data.
    """

    def __init__(self, message: str, *, is_refused: bool):
        super().__init__(message)
        self.is_refused = is_refused


RunJob = Callable[[Job, Report], None]
"""The function that measures a contender and writes its row, or raises `JobFailed`."""


def run_here(job: Job, report: Report) -> None:
    """Measures a contender in this process.

    Args:
        job: The order.
        report: Shows how far it is.

    Raises:
        JobFailed: The contender does not go with the models or data, or diverged.
    """
    if job.allow_code:
        allow_code([job.contender.method])
    try:
        measured = measure(
            job.contender,
            job.data_seed,
            job.root,
            state=job.state,
            report=report,
            allow_code=job.allow_code,
        )
    except InputError as error:
        raise JobFailed(str(error), is_refused=True) from error
    except NonFiniteObjectiveError as error:
        raise JobFailed(str(error), is_refused=False) from error
    save(measured, job.file)
    shutil.rmtree(job.state, ignore_errors=True)


def run_in_process(job: Job, report: Report) -> None:
    """Measures a contender in a process of its own.

    Args:
        job: The order.
        report: Shows how far it is.

    Raises:
        JobFailed: The process wrote no row.
    """
    environment = dict(os.environ)
    if cache := jax.config.values["jax_compilation_cache_dir"]:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # a signal of the terminal is for this process alone
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(_as_json(job)) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                report(line.rstrip())
            process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    for line in lines:
        if line.startswith("warning: "):
            report(line)
    if process.returncode:
        if process.returncode < 0:
            message = f"its process was ended by signal {-process.returncode}; was memory short?"
        else:
            message = lines[-1].removeprefix("error: ") if lines else "its process failed"
        raise JobFailed(readable(message), is_refused=process.returncode == 2)


def main() -> None:
    """Measures the contender of the order on standard input."""
    job = _from_json(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_starter, daemon=True).start()
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, force=True)
    try:
        run_here(job, lambda line: print(line, flush=True))
    except JobFailed as failure:
        print(f"error: {readable(str(failure))}", file=sys.stderr)
        sys.exit(2 if failure.is_refused else 1)


def _end_with_starter() -> None:
    """Ends this process when standard input ends."""
    sys.stdin.read()
    os._exit(1)


def _as_json(job: Job) -> dict[str, Any]:
    fields = job._asdict() | {name: str(getattr(job, name)) for name in ("root", "file", "state")}
    contender = job.contender._asdict()
    return fields | {"contender": contender | {"options": dict(job.contender.options)}}


def _from_json(fields: dict[str, Any]) -> Job:
    paths = {name: Path(fields[name]) for name in ("root", "file", "state")}
    return Job(**fields | paths | {"contender": Contender(**fields["contender"])})


if __name__ == "__main__":
    main()
