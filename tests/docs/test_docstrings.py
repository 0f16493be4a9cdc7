"""What users import: each name says what it takes and returns, and its examples are true."""

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import adamerge_jax
from adamerge_jax import granularities, interference, objectives, regularizers
from adamerge_jax.coefficients import constraints, granularity

CHOICES = {
    granularities: granularities.GRANULARITIES,
    interference: interference.STEPS,
    objectives: objectives.OBJECTIVES,
    regularizers: regularizers.REGULARIZERS,
}
"""Modules that users import from, and the choices of a recipe in each."""

PUBLIC = {f"adamerge_jax.{name}": getattr(adamerge_jax, name) for name in adamerge_jax.__all__}
CHOSEN = {
    f"{module.__name__}.{name}": choice
    for module, choices in CHOICES.items()
    for name, choice in choices.items()
}


def documentation(name: str, thing: Any) -> str:
    """The docstring of a name; that of a constant is the text below it."""
    if isinstance(thing, ModuleType | type) or inspect.isroutine(thing):
        return inspect.getdoc(thing) or ""
    module = {"CONSTRAINTS": constraints}[name.rpartition(".")[2]]
    body = ast.parse(inspect.getsource(module)).body
    position = next(
        i
        for i, node in enumerate(body)
        if isinstance(node, ast.AnnAssign) and node.target.id == name.rpartition(".")[2]
    )
    return inspect.cleandoc(ast.literal_eval(body[position + 1].value))


DOCUMENTATION = {name: documentation(name, thing) for name, thing in (PUBLIC | CHOSEN).items()}


def annotations(thing: Any) -> Iterator[str]:
    """The types of what a public function takes and returns, or a class holds, as written."""
    if isinstance(thing, type) or inspect.isfunction(thing):
        yield from map(str, inspect.get_annotations(thing).values())


@pytest.mark.parametrize("name", DOCUMENTATION)
def test_it_has_an_example(name: str):
    assert ">>> " in DOCUMENTATION[name]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, thing in PUBLIC.items()
        if isinstance(thing, dict | ModuleType)
        or any(re.search("jaxtyping|Array|PyTree|Values", each) for each in annotations(thing))
    ],
)
def test_it_says_the_shapes_of_arrays(name: str):
    before_the_example = DOCUMENTATION[name].partition("Examples:")[0]
    assert re.search(r"`\(?\[|`\(\*shape|pytree", before_the_example)


EXAMPLES = [
    test
    for source in ({"adamerge_jax": inspect.getdoc(adamerge_jax)}, DOCUMENTATION)
    for name, text in source.items()
    if (test := doctest.DocTestParser().get_doctest(text, {}, name, None, 0)).examples
] + [
    test
    for module in (*CHOICES, granularity)
    for test in doctest.DocTestFinder().find(module)
    if test.examples and test.name not in DOCUMENTATION
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_is_true(example: doctest.DocTest, capsys: pytest.CaptureFixture[str]):
    flags = doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.DocTestRunner(optionflags=flags, verbose=False).run(example)
    assert tried and not failed, capsys.readouterr().out


def test_every_part_of_the_interface_is_introduced():
    introduction = inspect.getdoc(adamerge_jax)
    for name in adamerge_jax.__all__:
        assert f"`{name}`" in introduction
