"""The tables of a page."""

from typing import NamedTuple


class Strip(NamedTuple):
    """The spread of numbers behind a cell: where it begins and ends, and where the start is.

    All are in percent of the cell's width.
    """

    low: float
    high: float
    start: float


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: Its text.
        style: Its CSS.
        best: True for the best of its column.
        strip: The spread of the numbers that it is the mean of.
        title: What there is to say of it, for who points at it.
    """

    text: str
    style: str = ""
    best: bool = False
    strip: Strip | None = None
    title: str = ""


class Line(NamedTuple):
    """A line of a table: its heading and its cells."""

    name: str
    cells: list[Cell]


class Grid(NamedTuple):
    """A table: its caption, the headings of its columns, its lines."""

    caption: str
    columns: list[str]
    lines: list[Line]
