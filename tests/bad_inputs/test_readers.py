"""Properties of the readers that are the package's own: a file is read right or refused."""

import json
import string
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, load_file, save_file

from adamerge_jax.checkpoints.mergekit import read_weights
from adamerge_jax.checkpoints.safetensors_file import (
    STORED_DTYPES,
    open_weights,
    read_entries,
    read_header,
    write_tensors,
)
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.data.records import READERS, read_records
from adamerge_jax.errors import InputError
from adamerge_jax.files.strict_yaml import read_yaml
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from adamerge_jax.recipes.schema import Recipe
from tests.bad_inputs.coefficients import FIELDS, GROUP
from tests.bad_inputs.suites import read_recipe

few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Fewer examples for readers that take a millisecond or more."""

names = st.text(string.ascii_lowercase + "._", min_size=1, max_size=12)

numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 1e39, 10**400])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)
"""What JSON and YAML can say."""


# --- safetensors

sizes = st.one_of(st.integers(0, 5), st.sampled_from([-1, 2**31, 2**62, 2**70, 1.5, None, "2"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*STORED_DTYPES, "F4", "F31", 5]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(st.integers(-2, 64), min_size=1, max_size=3),
    }
)


@given(
    header=st.dictionaries(names, st.one_of(entries, values), max_size=3), size=st.integers(0, 64)
)
@settings(parent=few, max_examples=100)
def test_a_header_is_read_as_the_library_reads_it_or_refused(header, size, tmp_path):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(size)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except InputError as error:
        assert "\n" not in str(error)
        return
    with safe_open(file, "np") as reference:
        assert set(tensors) == set(reference.keys())
        for name, info in tensors.items():
            assert info.shape == tuple(reference.get_slice(name).get_shape())
            assert info.start + info.dtype.itemsize * np.prod(info.shape, dtype=int) <= len(content)


@given(content=st.binary(max_size=200), length=st.sampled_from([None, 0, 8, 100, 2**40, 2**64 - 1]))
@few
def test_bytes_that_are_no_safetensors_are_refused(content, length, tmp_path):
    content = content if length is None else struct.pack("<Q", length) + content
    try:
        load(content)
    except (SafetensorError, ValueError):
        pass
    else:
        assume(False)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError):
        read_header(file)


stored = st.sampled_from([np.dtype(d) for n, d in STORED_DTYPES.items() if "F8" not in n])


@given(
    tensors=st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        stored.flatmap(
            lambda dtype: arrays.array_shapes(min_dims=0, min_side=0, max_side=5).map(
                lambda shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
            )
        ),
        max_size=4,
    )
)
@few
def test_tensors_are_read_as_they_were_written(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    file.unlink(missing_ok=True)
    write_tensors(file, dict(tensors))
    # Both ways: the library reads what is written, and the reader reads that.
    for name, array in load_file(file).items():
        np.testing.assert_array_equal(array, tensors[name])
    for name, info in read_header(file).items():
        assert (info.shape, info.dtype) == (tensors[name].shape, tensors[name].dtype)
        read = np.empty(tensors[name].size, info.dtype)
        with open_weights(file) as stream:
            read_entries(stream, name, info, 0, read)
        np.testing.assert_array_equal(read.reshape(info.shape), tensors[name])


# --- YAML and recipes

yaml_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), names
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


@given(value=yaml_values)
def test_yaml_is_read_as_it_was_written(value):
    assert read_yaml(yaml.safe_dump(value)) == value
    # JSON is YAML, but for numbers such as 1e-07, which this reader knows.
    assert read_yaml(json.dumps(value)) == value or "Infinity" in json.dumps(value)


@given(text=st.text("ab01: -[]{},&*!|>'\"#%\n\t~<.", max_size=60))
@settings(max_examples=200)
@example("&a [*a]")
@example("a: &a {<<: *a}")
@example("!!python/object/apply:os.system [true]")
@example("[" * 10_000)
@example("- " * 10_000)
@example("a: 0x" + "f" * 5000)
@example("\ud800")
def test_any_text_is_yaml_or_refused(text):
    try:
        value = read_yaml(text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    json.dumps(value)  # nothing but what JSON can say


@given(content=st.binary(max_size=40))
def test_any_bytes_are_yaml_or_refused(content):
    try:
        json.dumps(read_yaml(content))
    except InputError as error:
        assert "\n" not in str(error)


@given(fields=st.dictionaries(names, yaml_values, min_size=1, max_size=4), number=st.integers(0, 9))
def test_a_key_that_is_given_twice_is_refused(fields, number):
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    with pytest.raises(InputError, match="twice"):
        read_yaml("\n".join([*lines, lines[number % len(lines)]]).replace("Infinity", "0"))


def _places(schema: dict[str, Any], section: dict[str, Any]) -> list[list[str]]:
    """Returns the places of all fields of a recipe, of those in sections too."""
    places = []
    for name, field in section.get("properties", {}).items():
        places.append([name])
        if reference := field.get("$ref"):
            inner = _places(schema, schema["$defs"][reference.rpartition("/")[2]])
            places += [[name, *place] for place in inner]
    return places


_SCHEMA = Recipe.model_json_schema()


@given(place=st.sampled_from(_places(_SCHEMA, _SCHEMA)), value=values)
@settings(parent=few, max_examples=80)
def test_any_field_of_a_recipe_is_right_or_refused(place, value, suites):
    fields = section = read_recipe(suites["text"])
    *sections, field = place
    for name in sections:
        section[name] = section.get(name) if isinstance(section.get(name), dict) else {}
        section = section[name]
    section[field] = value
    try:
        recipe = parse_recipe(fields)
    except InputError as error:
        assert len(str(error)) < 20_000
        return
    # What was accepted can be written and read again: the run folder keeps it.
    again = parse_recipe(read_yaml(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


# --- mergekit


@pytest.fixture(scope="module")
def models(suites: dict[str, Path]) -> Models:
    return open_models(load_recipe(suites["text"] / "recipe.yaml"), suites["text"])


weights = st.one_of(
    values,
    st.lists(numbers, min_size=1, max_size=3),
    st.lists(
        st.fixed_dictionaries({"value": st.one_of(numbers, values)}, optional={"filter": values}),
        max_size=3,
    ),
)


@given(
    weight=weights,
    shared=st.dictionaries(st.sampled_from(["weight", "normalize", "lambda"]), weights, max_size=2),
    method=st.sampled_from(["linear", "task_arithmetic"]),
)
@settings(parent=few, max_examples=80)
def test_weights_of_mergekit_are_finite_or_refused(weight, shared, method, models, suites):
    config = {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": "base", "parameters": {"weight": 0.1}},
            {"model": "alpha", "parameters": {"weight": 0.4}},
            {"model": "beta", "parameters": {"weight": weight}},
        ],
        "parameters": shared,
    }
    file = suites["text"] / "drawn.yaml"
    file.write_text(yaml.safe_dump(config))
    try:
        coefficients = read_weights(file, models.base, models.experts)
    except InputError as error:
        assert "\n" not in str(error)
        return
    finally:
        file.unlink()
    assert set(coefficients) == set(models.base.names)
    for values_of_tensor in coefficients.values():
        assert values_of_tensor.shape == (2,)
        assert np.isfinite(values_of_tensor).all()


# --- coefficients files


@given(field=st.sampled_from(sorted(FIELDS)), value=values, deep=st.booleans())
@settings(parent=few, max_examples=80)
def test_any_metadata_of_coefficients_are_right_or_refused(field, value, deep, suites, tmp_path):
    whole = suites["text"] / "coefficients.safetensors"
    with safe_open(whole, "np") as opened:
        metadata = opened.metadata()
    text = json.dumps(value) if not deep else "[" * 50_000 + "]" * 50_000
    file = tmp_path / "coefficients.safetensors"
    file.unlink(missing_ok=True)
    save_file(load_file(whole), file, metadata | {field: text})
    try:
        coefficients = Coefficients.load(file)
    except InputError:
        return
    # What is accepted has a coefficient of each expert for each tensor.
    assert coefficients.per_tensor()[GROUP].shape == (2,)


# --- JSON lines, JSON, CSV


@given(rows=st.lists(st.dictionaries(names, st.one_of(scalars, st.lists(scalars)), min_size=1)))
def test_json_lines_are_read_as_they_were_written(rows, tmp_path_factory):
    assume("NaN" not in json.dumps(rows))
    assume(len(json.dumps(rows)) < 4000)
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_records(file, ".jsonl")) == rows


@given(kind=st.sampled_from(sorted(READERS)), content=st.binary(max_size=60))
@settings(max_examples=150)
@example(kind=".jsonl", content=b'{"a":' * 100_000)
@example(kind=".json", content=b"[" * 100_000)
@example(kind=".jsonl", content=b'{"a": ' + b"9" * 5000 + b"}")
@example(kind=".csv", content=b'a,b\n"1')
@example(kind=".jsonl", content=b'{"a": "\xed\xa0\x80"}')
def test_any_content_of_a_table_is_read_or_refused(kind, content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"rows{kind}"
    file.write_bytes(content)
    try:
        for record in read_records(file, kind):
            assert isinstance(record, dict)
    except InputError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)


@given(
    cut=st.integers(1, 400),
    kind=st.sampled_from([".jsonl", ".json"]),
    rows=st.lists(st.dictionaries(names, scalars, min_size=1), min_size=1, max_size=5),
)
def test_a_line_that_is_cut_is_told_with_its_number(cut, kind, rows, tmp_path_factory):
    lines = [json.dumps(row) + "\n" for row in rows]
    place = cut % len(lines)
    text = lines[place]
    assume(len(text) < 1000)
    lines[place] = text[: 1 + cut % (len(text) - 2)] + "\n"
    file = tmp_path_factory.getbasetemp() / f"cut{kind}"
    file.write_text("".join(lines))
    with pytest.raises(InputError, match=f"line {place + 1}: "):
        list(read_records(file, kind))
