"""The strict YAML reader: what is refused, with its line, and within what time."""

import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerge_jax.errors import InputError
from adamerge_jax.files.strict_yaml import read_yaml, read_yaml_file

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice, first in line 1"),
        ("a: {b: 1, 'b': 2}", "line 1: the key 'b' is given twice"),
        ("tasks:\n  no: {}", "line 2: the key no is no text to YAML; put it in quotes"),
        ("2023: 1", "the key 2023 is no text"),
        ("1.5: 1", "the key 1.5 is no text"),
        ("~: 1", "the key ~ is no text"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: &a [*a]", "line 1: a section contains itself"),
        ("a: &a {<<: *a}", "line 1: a section contains itself"),
        (LAUGHS, "more than 500,000 values"),
        ("[" * 100_000, "nested deeper than 50 levels"),
        ("- " * 10_000, "nested deeper than 50 levels"),
        ("{a: " * 10_000, "nested deeper than 50 levels"),
        ("\n".join(" " * n + "a:" for n in range(2000)), "nested deeper than 50 levels"),
        ("a: 0x" + "f" * 5000, "is too long for a number"),
        ("a: " + "9" * 5000, "is too long for a number"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: \x1b[2J", "special characters are not allowed"),
        ("a: b: c", "mapping values are not allowed here"),
        ("--- 1\n--- 2", "expected a single document"),
    ],
)
def test_refused(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read_yaml(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.perf_counter() - start < 5


def test_what_recipes_have() -> None:
    text = (
        "a: &a {rate: 1e-3, on: true}\n"
        "b: {<<: *a, rate: .5, day: 2023-01-02, none: ~, hex: 0x1f, time: 1:30, big: -.inf, n: 1_0}"
    )
    # `on` is a truth value of YAML 1.1.
    with pytest.raises(InputError, match="the key on is no text"):
        read_yaml(text)
    assert read_yaml(text.replace("on:", "'on':")) == {
        "a": {"rate": 0.001, "on": True},
        "b": {"rate": 0.5, "on": True, "day": "2023-01-02", "none": None, "hex": 31}
        | {"time": "1:30", "big": -math.inf, "n": 10},
    }


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    with pytest.raises(InputError, match=r"recipe\.yaml: cannot be read"):
        read_yaml_file(file)
    file.write_bytes(b"a: \xff\xfe\xfa")
    with pytest.raises(InputError, match=r"recipe\.yaml: not valid YAML"):
        read_yaml_file(file)
    with file.open("wb") as stream:
        stream.truncate(10_000_001)
    with pytest.raises(InputError, match="larger than 10,000,000 bytes"):
        read_yaml_file(file)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_anything_is_read_or_refused(text: bytes | str) -> None:
    try:
        read_yaml(text)
    except InputError as error:
        assert "\n" not in str(error)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for file in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match="is no file; expected a YAML file"):
            read_yaml_file(file)
