"""What the pages take from the project itself at build time, so that nothing is said twice.

In a page, on a line of its own:

- `{{ readme: Heading }}`: that section of README.md without its heading, and without those of its
  subsections that another page names;
- `{{ readme introduction }}`: what comes before its first section;
- `{{ readme rest }}`: its sections that no page names;
- `{{ recipe fields }}`: tables of all fields of a recipe;
- `{{ presets }}`: the presets with what they say;
- `{{ public names }}`: all that `adamerge_jax` exports.
"""

import inspect
import re
from collections.abc import Iterator
from importlib.resources import files as resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import adamerge_jax
from adamerge_jax.recipes.schema import Recipe, presets

ROOT = Path(__file__).parents[1]
DESCRIBED_ELSEWHERE = ("DenseDelta", "LowRankDelta", "Recipe")
"""Classes whose members a page of their own describes."""

MARKER = re.compile(r"^\{\{ (.+?) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the markers of a page."""
    pages = (file.content_string for file in files.documentation_pages())
    named = {m[1].removeprefix("readme: ") for each in pages for m in MARKER.finditer(each)}

    def fill(marker: re.Match[str]) -> str:
        what = marker[1]
        if what.startswith("readme: "):
            return section(what.removeprefix("readme: "), named)
        made = {
            "readme introduction": lambda: readme()[0].text,
            "readme rest": lambda: rest_of_the_readme(named),
            "recipe fields": recipe_fields,
            "presets": all_presets,
            "public names": public_names,
        }
        if what not in made:
            raise PluginError(f"{page.file.src_path}: there is no {{{{ {what} }}}}")
        return made[what]()

    return MARKER.sub(fill, markdown)


class Section(NamedTuple):
    """A heading of README.md and what stands below it, up to the next heading."""

    level: int
    heading: str
    text: str


def readme() -> list[Section]:
    """The sections of README.md in their order; the first is its title with the introduction."""
    found, in_code = [], False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines(keepends=True):
        in_code ^= line.startswith("```")
        heading = None if in_code else re.match(r"(#+) (.+)", line)
        if heading:
            found.append(Section(len(heading[1]), heading[2], ""))
        else:
            found[-1] = found[-1]._replace(text=found[-1].text + line)
    return found


def section(heading: str, named: set[str]) -> str:
    """A section of README.md without its heading, with those subsections that no page names."""
    sections = readme()
    position = next((i for i, own in enumerate(sections) if own.heading == heading), None)
    if position is None:
        raise PluginError(f"README.md has no section {heading!r}; a page asks for it")
    parts = [sections[position].text]
    for below in sections[position + 1 :]:
        if below.level <= sections[position].level:
            break
        if below.heading not in named:
            parts.append(f"{'#' * below.level} {below.heading}\n{below.text}")
    return "\n".join(parts)


def rest_of_the_readme(named: set[str]) -> str:
    """The sections of README.md that no page names."""
    return "\n".join(
        f"## {own.heading}\n{section(own.heading, named)}"
        for own in readme()
        if own.level == 2 and own.heading not in named
    )


def recipe_fields() -> str:
    """A table for the recipe and one for each of its sections."""
    return "\n\n".join(_table(where, model) for where, model in _sections("", Recipe, set()))


def _sections(
    where: str, model: type[BaseModel], seen: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those within, each once, with the path at which a recipe has it first."""
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
        what = _one_line(field.description or "") or _summary(field.annotation)
        kind = " ".join([_type(field.annotation), *filter(None, map(_bound, field.metadata))])
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {what} |")
    return "\n".join(lines)


def _summary(model: type[BaseModel]) -> str:
    return _one_line((model.__doc__ or "").partition("\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: Any) -> str:
    """A type in words; sections are links to their tables."""
    origin = get_origin(annotation)
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
    """What pydantic asks of a value, in words."""
    words = {"ge": "from", "gt": "over", "le": "to", "lt": "under", "min_length": "at least"}
    found = [
        (words[name], getattr(constraint, name)) for name in words if hasattr(constraint, name)
    ]
    return ", ".join(f"{word} {value}" for word, value in found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if isinstance(field.default, BaseModel):
        return ""
    return "none" if field.default is None else f"`{field.default}`"


def all_presets() -> str:
    """Each preset: its comment as text, then what it says."""
    folder = resources(presets)
    return "\n\n".join(
        _preset(name, folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        for name in sorted(presets.PRESETS, key=lambda name: (name != presets.DEFAULT_PRESET, name))
    )


def _preset(name: str, text: str) -> str:
    lines = text.splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:length])
    body = "\n".join(lines[length:])
    return f"## `{name}`\n\n{comment}\n\n```yaml\n{body}\n```"


def public_names() -> str:
    """A reference entry for each name that `adamerge_jax` exports; modules have their own pages."""
    exported = {name: getattr(adamerge_jax, name) for name in adamerge_jax.__all__}
    entries = []
    for name, thing in exported.items():
        if isinstance(thing, ModuleType):
            continue
        # By where it is defined: `adamerge_jax.task_vectors` is a module too.
        entry = f"::: {getattr(thing, '__module__', 'adamerge_jax')}.{name}"
        if name in DESCRIBED_ELSEWHERE:
            entry += "\n    options: {members: false}"
        entries.append(entry)
    return "\n\n".join(entries)
