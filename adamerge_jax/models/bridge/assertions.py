"""Assertions of a model's code about values, which are not known while JAX compiles it."""

import ast
import functools
import importlib
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

_CHECK = "torch_compilable_check"
"""The function by which models of `transformers` assert what a compiler may not know."""


@contextmanager
def without_assertions_of_values(model: PreTrainedModel) -> Iterator[None]:
    """Passes assertions of the model's code whose condition JAX does not know yet.

    Those about shapes still hold, or raise.
    """
    checked = _checked_code(type(model).__module__)
    before = [(function, function.__code__) for function, _ in checked]
    for function, code in checked:
        function.__code__ = code
    try:
        yield
    finally:
        for function, code in before:
            function.__code__ = code


@functools.cache
def _checked_code(module_name: str) -> list[tuple[types.FunctionType, types.CodeType]]:
    """Returns the functions of a module that assert something, and the code to run instead."""
    if not module_name.startswith("transformers.models."):
        return []
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    if "assert " not in source and _CHECK not in source:
        return []
    tree = ast.fix_missing_locations(_Passing().visit(ast.parse(source)))
    flags = compile("", "", "exec").co_flags
    whole = compile(tree, inspect.getfile(module), "exec", flags=flags, dont_inherit=True)
    by_place = {(code.co_name, code.co_firstlineno): code for code in _code_in(whole)}
    found = []
    for function in _functions_of(module):
        old = function.__code__
        new = by_place.get((old.co_name, old.co_firstlineno))
        if new is not None and "AssertionError" not in old.co_names and new.co_code != old.co_code:
            found.append((function, new))
    return found


class _Passing(ast.NodeTransformer):
    """Catches JAX's own errors in assertions."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        """Returns `try: assert ...` that passes on errors of JAX alone."""
        return self._passing(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        """Returns a call of `transformers`' own assertion in the same way, and others as is."""
        called = node.value.func if isinstance(node.value, ast.Call) else None
        is_check = isinstance(called, ast.Name) and called.id == _CHECK
        return self._passing(node) if is_check else node

    def _passing(self, node: ast.stmt) -> ast.Try:
        handler = ast.parse(
            "try:\n    pass\nexcept Exception as error:\n"
            "    if not type(error).__module__.startswith('jax'):\n        raise"
        ).body[0]
        assert isinstance(handler, ast.Try)
        handler.body = [node]
        for part in ast.walk(handler):
            if part is not node and not hasattr(part, "lineno"):
                ast.copy_location(part, node)
        return ast.copy_location(handler, node)


def _code_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields the code of functions at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _code_in(constant)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Yields functions of a module and of its classes, without their decorators."""
    holders: list[Any] = [module, *(c for c in vars(module).values() if inspect.isclass(c))]
    for holder in holders:
        if getattr(holder, "__module__", module.__name__) != module.__name__:
            continue
        for value in vars(holder).values():
            function = inspect.unwrap(value) if callable(value) else value
            is_function = isinstance(function, types.FunctionType)
            if is_function and function.__module__ == module.__name__:
                yield function
