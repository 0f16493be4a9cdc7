"""Objects and lists of JSON files."""

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_list, read_object, write_json


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "config.json"
    fields = {"b": 1e-05, "a": ["\u00e9", None]}
    write_json(file, fields)
    assert file.read_bytes() == (b'{\n  "b": 1e-05,\n  "a": [\n    "\\u00e9",\n    null\n  ]\n}\n')
    assert [*read_object(file).items()] == [*fields.items()]
    with pytest.raises(InputError, match="holds no list"):
        read_list(file)
    write_json(file, [1])
    assert read_list(file) == [1]
    with pytest.raises(InputError, match="holds no fields"):
        read_object(file)


def test_a_file_that_fills_the_memory_is_refused(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # and takes no disk
    with pytest.raises(InputError, match="more than 100,000,000 bytes"):
        read_object(file)
