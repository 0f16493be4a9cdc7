"""The tables that pages take from the code at build time.

In a page, on a line of its own:

- `{{ recipe fields }}`: tables of all fields of a recipe;
- `{{ public names of MODULE }}`: the names that a module exports.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adamerge_jax.recipes.schema import Recipe

DESCRIBED_ELSEWHERE = ("DenseDelta", "LowRankDelta", "Recipe")
"""Classes whose members a page of their own describes."""

MARKER = re.compile(r"^\{\{ (.+?) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the markers of a page."""
    tables = {"recipe fields": recipe_fields}

    def fill(marker: re.Match[str]) -> str:
        table, _, module = marker[1].partition(" of ")
        if table == "public names":
            return public_names(module)
        if table not in tables:
            raise PluginError(f"{page.file.src_path}: there is no {marker[0]}")
        return tables[table]()

    return MARKER.sub(fill, markdown)


def recipe_fields() -> str:
    """Returns a table for the recipe and one for each of its sections."""
    return "\n\n".join(_table(where, model) for where, model in _sections("", Recipe, set()))


def _sections(
    where: str, model: type[BaseModel], seen: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yields a section and those within, once, with the path at which a recipe first has it."""
    seen.add(model)
    yield where, model
    for name, field in model.model_fields.items():
        for part in _parts(field.annotation):
            if _is_section(part) and part not in seen:
                item = {dict: ".<name>", list: ".0"}.get(get_origin(field.annotation), "")
                yield from _sections(f"{where}{name}{item}.", part, seen)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def _table(where: str, model: type[BaseModel]) -> str:
    title = f"`{where.rstrip('.')}`" if where else "The recipe"
    lines = [f"## {title} {{#{model.__name__}}}", "", _summary(model), ""]
    lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = _one_line(field.description or "") or _summary(field.annotation)
        kind = " ".join([_type(field.annotation), *filter(None, map(_bound, field.metadata))])
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _summary(model: type[BaseModel]) -> str:
    return _one_line((model.__doc__ or "").partition("\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: Any) -> str:
    """Returns a type in words; sections are links to their tables."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if _is_section(annotation):
        return f"[section](#{annotation.__name__})"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    inner = [_type(part) for part in get_args(annotation) if part is not type(None)]
    if origin is list:
        return f"list of {inner[0]}"
    if origin is dict:
        return f"{inner[1]} by name"
    if origin is tuple:
        return f"{len(inner)} times {inner[0]}"
    if inner:
        return " or ".join(inner)
    return "any" if annotation is Any else f"`{annotation.__name__}`"


def _bound(constraint: Any) -> str:
    """Returns a constraint of pydantic on a value, in words."""
    words = {"ge": "from", "gt": "over", "le": "to", "lt": "under", "min_length": "at least"}
    return ", ".join(
        f"{word} {getattr(constraint, name)}"
        for name, word in words.items()
        if hasattr(constraint, name)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if isinstance(field.default, BaseModel):
        return ""
    return "none" if field.default is None else f"`{field.default}`"


def public_names(module: str) -> str:
    """Returns a reference entry for each name that a module exports, except modules."""
    entries = []
    exporting = importlib.import_module(module)
    for name in exporting.__all__:
        exported = getattr(exporting, name)
        if isinstance(exported, ModuleType):
            continue
        # The module of its definition: a function and its file may have one name.
        home = getattr(exported, "__module__", module)
        entry = f"::: {home}.{getattr(exported, '__qualname__', name)}"
        if name in DESCRIBED_ELSEWHERE:
            entry += "\n    options: {members: false}"
        entries.append(entry)
    return "\n\n".join(entries)
