"""What commands print: tables, lines and notes."""

from collections.abc import Sequence

from rich.console import Console

from adamerge_jax.report.results import results_tables
from adamerge_jax.runs.results import Results


def print_results(results: Results, console: Console) -> None:
    """Prints the tables of results, if there are any."""
    if tables := results_tables(results):
        console.print(*tables, sep="\n\n")


def print_lines(lines: Sequence[str], console: Console) -> None:
    """Prints lines as they are, without markup or breaks."""
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def print_notes(notes: Sequence[str], console: Console) -> None:
    """Prints notes, a line each."""
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
