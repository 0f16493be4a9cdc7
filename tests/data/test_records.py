import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from adamerge_jax.data.records import read_records
from adamerge_jax.errors import InputError

ROWS = [{"text": "a ä", "label": 0}, {"text": "b", "label": 1}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(tmp_path: Path, content: bytes, name: str, kind: str) -> list[dict]:
    (tmp_path / name).write_bytes(content)
    return list(read_records(tmp_path / name, kind))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (LINES, ".jsonl"),
        (LINES, ".json"),
        (b"\xef\xbb\xbf" + LINES, ".jsonl"),
        (LINES.replace(b"\n", b"\r\n\r\n"), ".jsonl"),
        (json.dumps(ROWS, indent=1).encode(), ".json"),
    ],
)
def test_json(tmp_path, content, kind):
    assert read(tmp_path, content, "data", kind) == ROWS


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("BZ2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed(tmp_path, suffix, compress):
    name = f"data.jsonl.{suffix}"
    assert read(tmp_path, compress(LINES), name, ".jsonl") == ROWS
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        read(tmp_path, compress(LINES)[:-9], name, ".jsonl")
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        read(tmp_path, LINES, name, ".jsonl")


def test_separated_values(tmp_path):
    content = b'text,n\n"a, ""b""\nc",1\n\n007,\n'
    expected = [{"text": 'a, "b"\nc', "n": "1"}, {"text": "007", "n": ""}]
    assert read(tmp_path, content, "data.csv", ".csv") == expected
    tabs = b"text\tn\r\na, b\t1\r\n"
    assert read(tmp_path, tabs, "data.tsv", ".tsv") == [{"text": "a, b", "n": "1"}]


def test_a_text_per_line(tmp_path):
    assert read(tmp_path, b" a\tb\r\n\nc", "data.txt", ".txt") == [{"text": " a\tb"}, {"text": "c"}]


def test_a_long_line(tmp_path):
    text = "a " * 5_000_000
    line = json.dumps({"text": text}).encode()
    assert read(tmp_path, LINES + line, "data.jsonl", ".jsonl")[2]["text"] == text
    assert read(tmp_path, b"text\n" + text.encode(), "data.csv", ".csv")[0]["text"] == text


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("adamerge_jax.data.records.LONGEST_LINE", 1000)
    with pytest.raises(InputError, match="line 1: has more than 1,000 bytes"):
        read(tmp_path, gzip.compress(b"a" * 10**7), "data.txt.gz", ".txt")


def test_lines_for_hours_in_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr("adamerge_jax.data.records._USUAL_SIZE", 10**6)
    content = gzip.compress(b"a\n" * 10**6)
    with pytest.raises(InputError, match="more than 200 times as large without compression"):
        read(tmp_path, content, "data.txt.gz", ".txt")
    monkeypatch.setattr("adamerge_jax.data.records._USUAL_SIZE", 2 * 10**6)
    assert len(read(tmp_path, content, "data.txt.gz", ".txt")) == 10**6


def test_an_edited_file_of_the_same_time(tmp_path):
    read(tmp_path, LINES, "data.jsonl", ".jsonl")
    stat = (tmp_path / "data.jsonl").stat()
    edited = LINES.replace(b'"b"', b'"c"')
    (tmp_path / "data.jsonl").write_bytes(edited)
    os.utime(tmp_path / "data.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [row["text"] for row in read_records(tmp_path / "data.jsonl", ".jsonl")] == ["a ä", "c"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (LINES + b'\n{"text": "x", "label": \n' + LINES, ".jsonl", "line 4: is no JSON: .*label"),
        (b'[{"text": 1},\n {"text" 2}]', ".json", "line 2: is no JSON: .*delimiter"),
        (b"{\n}", ".json", "line 1: is no JSON"),
        (b"[1]\n", ".jsonl", r"line 1: holds \[1\], expected an object"),
        (b"[1]\n", ".json", "row 0: holds 1, expected an object"),
        (b'{"a": 1, "b": 2, "a": 3}', ".jsonl", "line 1: an object has the name 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", ".jsonl", "line 1: .*digits"),
        (
            b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            ".jsonl",
            "line 1: .* nested too",
        ),
        (LINES.decode().encode("utf-16"), ".jsonl", "line 1: begins as UTF-16 does"),
        (LINES.decode().encode("utf-16-le"), ".jsonl", "line 1: has a character 0, as UTF-16"),
        (
            b"{}\n" + LINES.decode().encode("latin-1"),
            ".jsonl",
            "line 2: byte 13, 0xe4, is no UTF-8",
        ),
        ("text\nä\n".encode("cp1252"), ".csv", "line 2: byte 1, 0xe4, is no UTF-8"),
        (b"a,b\n1,2\n1,2,3\n", ".csv", r"line 3: has 3 cells, the first line has 2 \(a, b\)"),
        (b'a,b\n"1\n2",2\n1\n', ".csv", "line 4: has 1 cells"),
        (b"a,b,a\n1,2,3\n", ".csv", "line 1: names the column 'a' twice"),
        (b'a,b\n1,2\n"1" or,2\n', ".csv", "line 3: .*quotes"),
        (b'a,b\n1,2\n"1,2\n3,4\n', ".csv", "line 3: unexpected end of data"),
    ],
)
def test_the_line_and_the_cause_are_named(tmp_path, content, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content, f"data{kind}", kind)
    assert str(caught.value).startswith(f"{tmp_path}/data{kind}, ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))
