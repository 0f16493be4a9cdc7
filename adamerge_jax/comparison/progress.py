"""The progress of a comparison, on a console and in a file that can be followed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter

from rich.console import Console

from adamerge_jax.comparison.contenders import Contender
from adamerge_jax.comparison.measure import Measured, Report
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.report.results import in_words


class Progress:
    """The number of rows that are there, and the time that the others will take.

    A row is expected to take the mean time of rows of its kind, or of all where there is none.
    """

    def __init__(
        self, console: Console, file: Path, missing: Sequence[Contender], present: int
    ) -> None:
        """Says how much there is to do.

        Args:
            console: The console that shows it.
            file: The file to append lines to.
            missing: The contenders without a row, in their order.
            present: The number of rows that are there already.
        """
        self._console = console
        self._file = file
        self._missing = list(missing)
        self._total = present + len(missing)
        self._seconds: dict[str, list[float]] = {}
        there = f", {present} are there already" if present else ""
        self.tell(f"{_rows(len(missing))} to measure{there}")

    @contextmanager
    def measuring(self, contender: Contender) -> Iterator[Report]:
        """Shows a contender while it is measured, and counts it when it is done or has failed."""
        start = perf_counter()
        number = self._total - len(self._missing) + 1
        label = f"row {number} of {self._total}: {_label(contender)}"
        with self._console.status(one_line(label)) as status:

            def report(line: str) -> None:
                status.update(one_line(f"{label}: {line}{self._left()}"))
                self._write(f"{label}: {line}")

            try:
                yield report
            finally:
                self._missing.remove(contender)
                self._seconds.setdefault(contender.kind, []).append(perf_counter() - start)

    def done(self, contender: Contender, measured: Measured) -> None:
        """Tells the result of a contender, and the time left."""
        averages = [in_words(row.average, row.metric) for row in measured.rows]
        scores = f"{_label(contender)}: {' and '.join(averages)}"
        cost = measured.cost
        self.tell(
            f"{scores} ({cost.seconds + cost.evaluation_seconds:.0f} s, "
            f"{cost.peak_memory_bytes / 1e9:.1f} GB){self._left()}"
        )

    def skip(self, contender: Contender) -> None:
        """Counts a contender that is not measured."""
        self._missing.remove(contender)

    def failed(self, contender: Contender, reason: str) -> None:
        """Tells why a contender has no row."""
        self.tell(f"{_label(contender)} has no row: {reason}{self._left()}")

    def tell(self, line: str) -> None:
        """Writes a line to the console and to the file."""
        self._console.print(one_line(line, longest=1000), highlight=False, soft_wrap=True)
        self._write(line)

    def _write(self, line: str) -> None:
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{now} {one_line(line, longest=1000)}\n")

    def _left(self) -> str:
        """Returns the number of missing rows and the time that they will take, in words."""
        if not self._missing:
            return ""
        words = f"; {_rows(len(self._missing))} left"
        everything = [seconds for kind in self._seconds.values() for seconds in kind]
        if not everything:
            return words
        expected = 0.0
        for contender in self._missing:
            alike = self._seconds.get(contender.kind, everything)
            expected += sum(alike) / len(alike)
        return f"{words}, about {timedelta(seconds=round(expected))}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _label(contender: Contender) -> str:
    if contender.kind == "references":
        return contender.name
    return f"{contender.name}, seed {contender.seed}"
