"""Rows of text files, streamed: JSON lines, JSON, CSV, TSV and plain text, also compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from adamerge_jax.errors import InputError, in_one_line

Record = dict[str, Any]

LONGEST_LINE = 2**28
"""Bytes of the longest line: a compressed file of zeros would fill the memory."""

_USUAL_SIZE, _MOST_GROWTH = 2**27, 200
"""Bytes of any compressed file without compression, and how many times as large as the file they
may be if they are more: a file of a megabyte may hold lines for hours."""

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_records(file: Path, kind: str) -> Iterator[Record]:
    """Yields the rows of a file, one after the other; only one is in memory.

    Args:
        file: The file.
        kind: Its kind, one of `READERS`.

    Raises:
        InputError: A line cannot be read, with its number, from 1, and the cause.
    """
    try:
        yield from READERS[kind](file)
    except InputError as error:
        raise InputError(f"{file}, {error}") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of each line, its end included."""
    with _OPENERS.get(file.suffix.lower(), _open_plain)(file) as stream:
        read, most = 0, max(_USUAL_SIZE, _MOST_GROWTH * file.stat().st_size)
        for number in count(1):
            line = stream.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise InputError(f"line {number}: has more than {LONGEST_LINE:,} bytes")
            read += len(line)
            if read > most:
                raise InputError(
                    f"line {number}: the file is more than {_MOST_GROWTH} times as large without "
                    "compression, which no data is; download it again"
                )
            if number == 1:
                if line.startswith(_UTF16):
                    raise InputError("line 1: begins as UTF-16 does; save the file as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in line:
                raise InputError(
                    f"line {number}: has a character 0, as UTF-16 read as UTF-8 has, or a file "
                    "that is no text; save it as UTF-8"
                )
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"line {number}: byte {error.start + 1}, {line[error.start]:#04x}, is no "
                    "UTF-8; the file has another encoding, perhaps Latin-1 or Windows-1252: save "
                    "it as UTF-8"
                ) from error
            yield number, text


def _open_plain(file: Path) -> BinaryIO:
    """Opens a file for reading bytes."""
    return file.open("rb")


def _json_lines(file: Path) -> Iterator[Record]:
    for number, line in _lines(file):
        if line.strip():
            yield _object(_parse(line.strip(), f"line {number}"), f"line {number}")


def _json(file: Path) -> Iterator[Record]:
    """Yields the objects of a list, or of lines with one object each."""
    begins = next((line.lstrip()[0] for _, line in _lines(file) if line.strip()), "")
    if begins != "[":
        yield from _json_lines(file)
        return
    whole = "".join(line for _, line in _lines(file))
    for row, value in enumerate(_parse(whole, None)):
        yield _object(value, f"row {row}")


def _parse(text: str, where: str | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise InputError(
            f"{where or f'line {error.lineno}'}: is no JSON: {error.msg}, character {error.colno}, "
            f"at {around!r}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where or 'line 1'}: is JSON nested too deeply") from error
    except ValueError as error:  # a name twice, a number of thousands of digits
        raise InputError(f"{where or 'line 1'}: {in_one_line(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return record


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: holds {json.dumps(value):.60}, expected an object with a name for each "
            'column, as {"text": ...}'
        )
    return value


def _separated(separator: str) -> Callable[[Path], Iterator[Record]]:
    def read(file: Path) -> Iterator[Record]:
        # The limit of the module is for the whole process, and 131,072 characters at first.
        csv.field_size_limit(LONGEST_LINE)
        reader = csv.reader((line for _, line in _lines(file)), delimiter=separator, strict=True)
        header: list[str] = []
        number = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise InputError(
                    f"line {number}: {in_one_line(error)}; a text with quotation marks must be in "
                    "quotes, with the marks within doubled; or write the file as .jsonl"
                ) from error
            if cells is None:
                return
            if cells and not header:
                header = _header(cells, number)
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"line {number}: has {len(cells)} cells, the first line has "
                        f"{len(header)} ({', '.join(header)}); a text that holds "
                        f"{separator!r} must be in quotes"
                    )
                yield dict(zip(header, cells, strict=True))
            number = reader.line_num + 1

    return read


def _header(cells: Sequence[str], number: int) -> list[str]:
    for name in cells:
        if list(cells).count(name) > 1:
            raise InputError(f"line {number}: names the column {name!r} twice")
    return list(cells)


def _text_lines(file: Path) -> Iterator[Record]:
    for _, line in _lines(file):
        text = line.rstrip("\r\n")
        if text.strip():
            yield {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _text_lines,
}
"""The reader of each kind of text file; blank lines are skipped."""
