"""The bar that shows how much of something is done, and the time left."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def make_bar(
    words: ProgressColumn,
    *numbers: ProgressColumn,
    console: Console | None = None,
    transient: bool = False,
) -> Progress:
    """Makes a bar of what is counted.

    Args:
        words: The words before the bar.
        numbers: What stands behind the count.
        console: The console to show it on; None where another display shows it.
        transient: True for a bar that is gone when all is done.
    """
    return Progress(
        words,
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *numbers,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
