"""The results of a run that has ended."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.devices import is_first_process
from adamerge_jax.files.writing import remove_partial
from adamerge_jax.report.results import results_table
from adamerge_jax.runs.files import COEFFICIENTS_FILE, RESULTS_FILE
from adamerge_jax.runs.results import read_results
from adamerge_jax.runs.rows import Row


class Run(NamedTuple):
    """The results of a finished run.

    Attributes:
        folder: The run folder.
        coefficients: The learned coefficients.
        rows: The table of results, the learned merge last; empty without test data.

    Examples:
        >>> import adamerge_jax as am
        >>> am.Run._fields
        ('folder', 'coefficients', 'rows')
    """

    folder: Path
    coefficients: Coefficients
    rows: list[Row]

    @property
    def table(self) -> Table | None:
        """The table of results as terminals and notebooks show it; None without test data."""
        return results_table(self.rows) if self.rows else None


def ended_run(out: Path, console: Console) -> Run:
    """Returns the results of a run that has ended, and says that nothing is left to do."""
    if is_first_process():
        remove_partial(out)
    ended = f"{out} holds a run that has ended; there is nothing left to do"
    console.print(ended, highlight=False, soft_wrap=True)
    coefficients = Coefficients.load(out / COEFFICIENTS_FILE)
    return Run(out, coefficients, read_results(out / RESULTS_FILE).rows)
