"""Tables of texts, prompts and conversations that are damaged, empty, or hold something else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from numpy.random import Generator

from tests.bad_inputs.bad import DEEP, Bad, nested, recipe_field, written
from tests.bad_inputs.suites import WORDS, replace

FILE = "alpha.cal.jsonl"
TEST = "alpha.test.jsonl"

NOT_TEXTS: dict[str, Any] = {
    "number": 5,
    "null": None,
    "list": ["w1"],
    "fields": {"a": "w1"},
    "true": True,
    "fraction": 0.5,
}
NOT_CLASSES: dict[str, Any] = {
    "negative": -1,
    "over-the-head": 3,
    "text": "w1",
    "digit-in-a-text": "1",
    "fraction": 1.5,
    "whole-fraction": 1e300,
    "null": None,
    "true": True,
    "list": [1],
    "2^31": 2**31,
    "2^40": 2**40,
    "2^63": 2**63,
    "2^70": 2**70,
    "fields": {"a": 1},
}
NOT_CONVERSATIONS: dict[str, Any] = {
    "text": "w1 w2",
    "number": 5,
    "null": None,
    "empty": [],
    "texts": ["w1", "w2"],
    "without-role": [{"content": "w1"}, {"content": "w2"}],
    "role-number": [{"role": 5, "content": "w1"}],
    "without-content": [{"role": "user"}, {"role": "assistant"}],
    "fields": {"role": "user", "content": "w1"},
}


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad tables, of classifiers and of language models."""
    whole = (suites["text"] / FILE).read_text()
    for name, content in _contents(whole, generator):
        yield Bad(f"jsonl-{name}", written(FILE, content))
    test = (suites["text"] / TEST).read_text()
    for name, content in _contents(test, generator):
        if name in ("one-line-cut", "not-utf-8", "deep", "list-in-a-line"):
            yield Bad(f"jsonl-of-tests-{name}", written(TEST, content))
    rows = [json.loads(line) for line in test.splitlines()]
    for name, value in NOT_TEXTS.items():
        place = int(generator.integers(len(rows)))
        yield Bad(f"text-{name}", _rows(FILE, rows, place, text=value))
        every = [row | {"text": value} for row in rows]
        yield Bad(f"text-all-{name}", _lines(FILE, every))
    yield Bad("text-lacking", _rows(FILE, rows, 3, text=...))
    for name, value in NOT_CLASSES.items():
        place = int(generator.integers(len(rows)))
        yield Bad(f"label-{name}", _rows(TEST, rows, place, label=value))
        if name not in ("whole-fraction",):
            every = [row | {"label": value} for row in rows]
            yield Bad(f"label-all-{name}", _lines(TEST, every))
    yield Bad("label-lacking", _rows(TEST, rows, 3, label=...))
    yield Bad("few", written(FILE, "".join(whole.splitlines(keepends=True)[:3])))
    yield Bad("lines-blank", written(FILE, "\n" * 50))
    yield Bad("column-of-another-name", _lines(FILE, [{"sentence": row["text"]} for row in rows]))
    yield Bad("a-token-outside", _lines(FILE, [{"text": ""}] * 20 + [{"text": None}] * 20))
    yield Bad("absent", lambda root: (root / FILE).unlink())
    yield Bad("folder-of-the-name", lambda root: [(root / FILE).unlink(), (root / FILE).mkdir()])
    for path in ("none.jsonl", "none.json", "none.csv", "none.txt", "none.arrow", "none.jsonl.gz"):
        yield Bad(f"absent-{path}", recipe_field("tasks.alpha.calibration", path))
    for name, column in {"text": "txet", "label": "lable", "text-pair": ["text", "txet"]}.items():
        part, field = ("test", "label") if name == "label" else ("calibration", "text")
        yield Bad(f"unknown-column-{name}", recipe_field(f"tasks.alpha.{part}.{field}", column))
    yield from _other_formats(rows, generator)
    yield from _of_language_models(suites["language"])


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields tables of other formats that are as they should be."""
    rows = [json.loads(line) for line in (suites["text"] / TEST).read_text().splitlines()]
    texts = [row["text"] for row in rows]
    yield Bad("csv", _of(".csv", "text\n" + "".join(f"{text}\n" for text in texts)))
    yield Bad("tsv", _of(".tsv", "id\ttext\n" + "".join(f"1\t{text}\n" for text in texts)))
    yield Bad("parquet", _of(".parquet", _parquet(text=texts)))
    yield Bad("json", _of(".json", json.dumps(rows)))
    yield Bad("blank-lines", written(FILE, "\n".join([*map(json.dumps, rows), "", ""])))


def _contents(whole: str, generator: Generator) -> Iterator[tuple[str, bytes]]:
    """Yields contents of a .jsonl file."""
    lines = whole.splitlines(keepends=True)
    content = whole.encode()

    def with_line(line: str | bytes) -> bytes:
        place = int(generator.integers(1, len(lines)))
        before, after = "".join(lines[:place]).encode(), "".join(lines[place:]).encode()
        return before + (line if isinstance(line, bytes) else line.encode()) + b"\n" + after

    yield "empty", b""
    yield "one-line-cut", with_line('{"text": "w1')
    yield "comma-lost", with_line('{"text": "w1" "label": 1}')
    yield "quotes-single", with_line("{'text': 'w1'}")
    yield "python-none", with_line('{"text": None}')
    yield "trailing-comma", with_line('{"text": "w1",}')
    yield "comment", with_line("// a comment")
    yield "two-on-a-line", with_line('{"text": "w1"} , {"text": "w2"}')
    yield "number-in-a-line", with_line("5")
    yield "text-in-a-line", with_line('"w1 w2"')
    yield "list-in-a-line", with_line('["w1", "w2"]')
    yield "null-in-a-line", with_line("null")
    yield "not-utf-8", with_line(b'{"text": "w\xff\xfe1"}')
    yield "latin-1", with_line('{"text": "caf\u00e9"}'.encode("latin-1"))
    yield "nul-bytes", with_line(b"\0\0\0\0")
    yield "all-nul-bytes", bytes(3000)
    yield "cut", content[:-7]
    yield "deep", with_line('{"text": ' + nested() + "}")
    yield "deep-fields", with_line('{"a":' * DEEP + "1" + "}" * DEEP)
    yield "csv", b"text,label\nw1,0\nw2,1\n"
    yield "yaml", b"- text: w1\n- text: w2\n"
    yield "html", b"<!DOCTYPE html>\n<html>\n</html>\n"
    yield "lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n"
    yield "pickled", b"\x80\x04\x95" + generator.bytes(300)
    yield "gzipped", b"\x1f\x8b\x08" + generator.bytes(300)
    yield "random", generator.bytes(1000)
    for number in range(8):
        place = int(generator.integers(len(lines)))
        at = int(generator.integers(1, len(lines[place]) - 2))
        cut = [*lines[:place], lines[place][:at] + "\n", *lines[place + 1 :]]
        yield f"line-{place}-cut-at-{at}-{number}", "".join(cut).encode()


def _other_formats(rows: list[dict[str, Any]], generator: Generator) -> Iterator[Bad]:
    lines = "".join(f"{row['text']},{row['label']}\n" for row in rows)
    table = pyarrow.table({"text": [row["text"] for row in rows]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    parquet = sink.getvalue().to_pybytes()
    for name, suffix, content in (
        ("csv-empty", ".csv", ""),
        ("csv-header-alone", ".csv", "text,label\n"),
        ("csv-without-header", ".csv", lines),
        ("csv-more-cells", ".csv", f"text,label\n{lines}w1,1,2,3\n"),
        ("csv-quote-open", ".csv", f'text,label\n"w1,1\n{lines}'),
        ("csv-not-utf-8", ".csv", b"text,label\nw\xff\xfe1,0\n" * 20),
        ("csv-nul-bytes", ".csv", bytes(500)),
        ("csv-utf-16", ".csv", f"text,label\n{lines}".encode("utf-16")),
        ("tsv-of-commas", ".tsv", f"text,label\n{lines}"),
        ("tsv-quote-open", ".tsv", 'text\tlabel\n"w1\t1\n' + lines.replace(",", "\t")),
        ("tsv-empty", ".tsv", ""),
        ("parquet-empty", ".parquet", ""),
        ("parquet-cut", ".parquet", parquet[: int(generator.integers(10, len(parquet) - 10))]),
        ("parquet-text", ".parquet", "PAR1 text"),
        ("parquet-zeros", ".parquet", b"PAR1" + bytes(200) + b"PAR1"),
        ("parquet-of-no-text", ".parquet", _parquet(number=[1, 2, 3])),
        ("parquet-of-numbers", ".parquet", _parquet(text=list(range(20)))),
        ("parquet-without-rows", ".parquet", _parquet(text=pyarrow.array([], pyarrow.string()))),
        ("json-cut", ".json", json.dumps(rows)[:-9]),
        ("json-number", ".json", "5"),
        ("json-deep", ".json", nested()),
        ("json-empty-list", ".json", "[]"),
        ("unknown-suffix", ".xlsx", "PK"),
        ("unknown-suffix-pickle", ".pkl", b"\x80\x04."),
        ("unknown-suffix-none", "", "w1 w2"),
    ):
        yield Bad(name, _of(suffix, content))


def _of(suffix: str, content: bytes | str) -> Callable[[Path], None]:
    """Returns the damage of calibration data in a file of another format."""

    def damage(root: Path) -> None:
        replace(root / f"data{suffix}", content)
        recipe_field("tasks.alpha.calibration", f"data{suffix}")(root)

    return damage


def _parquet(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _of_language_models(suite: Path) -> Iterator[Bad]:
    file = "code.cal.jsonl"
    rows = [json.loads(line) for line in (suite / file).read_text().splitlines()]
    for column in ("prompt", "response"):
        for name, value in NOT_TEXTS.items():
            yield Bad(f"{column}-{name}", _rows(file, rows, 2, **{column: value}), "language")
        without = [{k: v for k, v in row.items() if k != column} for row in rows]
        yield Bad(f"without-{column}", _lines(file, without), "language")
    long = " ".join(WORDS)
    yield Bad(
        "prompts-too-long", _lines(file, [row | {"prompt": long} for row in rows]), "language"
    )
    for name, value in NOT_CONVERSATIONS.items():
        damage = _lines(file, [{"messages": value}] * 20)
        yield Bad(f"messages-{name}", damage, "language")
    yield Bad("arrays", recipe_field("tasks.code.calibration", "data.npz"), "language")


def _lines(file: str, rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    return written(file, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(
    file: str, rows: list[dict[str, Any]], place: int, **fields: Any
) -> Callable[[Path], None]:
    """Returns the damage of one row; `...` removes a field."""
    row = {k: v for k, v in (rows[place] | fields).items() if v is not ...}
    return _lines(file, [*rows[:place], row, *rows[place + 1 :]])
