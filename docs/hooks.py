"""What the pages take from the project itself at build time, so that nothing is said twice.

In a page, on a line of its own:

- `{{ readme: Heading }}`: that section of README.md, without its heading;
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
from typing import Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import adamerge_jax
from adamerge_jax import presets
from adamerge_jax.recipes import Recipe

ROOT = Path(__file__).parents[1]
DESCRIBED_ELSEWHERE = ("DenseDelta", "LowRankDelta", "Recipe")
"""Classes whose members a page of their own describes."""

MARKER = re.compile(r"^\{\{ (.+?) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the markers of a page."""

    def fill(marker: re.Match[str]) -> str:
        what = marker[1]
        if what == "readme introduction":
            return introduction()
        if what == "readme rest":
            return rest_of_the_readme(Path(config.docs_dir))
        if what == "recipe fields":
            return recipe_fields()
        if what == "presets":
            return all_presets()
        if what == "public names":
            return public_names()
        if what.startswith("readme: "):
            return section(what.removeprefix("readme: "))
        raise PluginError(f"{page.file.src_path}: there is no {{{{ {what} }}}}")

    return MARKER.sub(fill, markdown)


def sections() -> dict[str, str]:
    """The sections of README.md by heading; a subsection is in its section too."""
    found: dict[str, str] = {}
    open_headings: dict[int, str] = {}
    in_code = False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines(keepends=True):
        in_code ^= line.startswith("```")
        heading = None if in_code else re.match(r"(##+) (.+)", line)
        if heading:
            level = len(heading[1])
            open_headings = {depth: h for depth, h in open_headings.items() if depth < level}
        for title in open_headings.values():
            found[title] += line
        if heading:
            open_headings[level] = heading[2]
            found[heading[2]] = ""
    return found


def section(heading: str) -> str:
    """One section of README.md without its heading; its subsections come up a level."""
    try:
        return sections()[heading]
    except KeyError:
        raise PluginError(f"README.md has no section {heading!r}; a page asks for it") from None


def introduction() -> str:
    """README.md from below its title to its first section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("\n## ")[0].partition("\n")[2]


def rest_of_the_readme(folder: Path) -> str:
    """The sections of README.md that no page names."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(folder.rglob("*.md")))
    named = {m[1].removeprefix("readme: ") for m in MARKER.finditer(pages)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    return "\n".join(f"## {h}\n{section(h)}" for h in headings if h not in named)


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
