"""The parts of a method's page that are taken from the code and from the page of measurements.

In `docs/methods/NAME.md`, on a line of its own:

- `{{ source of NAME }}`: one line on the method or the preset, with its paper;
- `{{ use of NAME }}`: its options with defaults, commands and recipes, and the figures measured.
"""

import inspect
import re
from collections.abc import Iterator
from importlib.resources import files as resources
from pathlib import Path
from typing import NamedTuple

import charts
import docstring_parser
import yaml
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from adamerge_jax.methods import METHODS
from adamerge_jax.recipes import presets

MARKER = re.compile(r"^\{\{ (source|use) of (.+?) \}\}$", re.MULTILINE)

MEASURED = Path(__file__).parent / "guides" / "measured.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the markers of a method's page."""

    def fill(marker: re.Match[str]) -> str:
        part, name = marker.groups()
        if name not in METHODS and name not in presets.PRESETS:
            raise PluginError(f"{page.file.src_path}: there is no method or preset {name}")
        return source_of(name) if part == "source" else use_of(name)

    return MARKER.sub(fill, markdown)


def source_of(name: str) -> str:
    """Returns the line on a method or preset that its file begins with."""
    if name in METHODS:
        return inspect.cleandoc(inspect.getmodule(METHODS[name]).__doc__).partition("\n\n")[0]
    return _preset(name)[0]


def use_of(name: str) -> str:
    """Returns the sections on how to take a method or preset, and on what it reached."""
    sections = _use_of_method(name) if name in METHODS else _use_of_preset(name)
    return "\n\n".join([*sections, "## Measured", *measured(name)])


def _use_of_method(name: str) -> Iterator[str]:
    options = _options(name)
    parameters = inspect.signature(METHODS[name]).parameters
    meanings = {
        each.arg_name: each.description
        for each in docstring_parser.parse(METHODS[name].__doc__).params
    }
    yield "## Options"
    if parameters:
        rows = ["| option | default | |", "| --- | --- | --- |"]
        for option, parameter in parameters.items():
            meaning = " ".join(meanings[option].split()).replace("|", "\\|")
            rows.append(f"| `{option}` | `{parameter.default}` | {meaning} |")
        yield "\n".join(rows)
    else:
        yield "None."
    yield "## Use it"
    given = f" \\\n        --options '{_flow(options)}'" if options else ""
    yield f"    adamerge merge recipe.yaml --method {name}{given} --out merged"
    choice = {"name": name} | ({"options": options} if options else {})
    yield "As a row of the table of results:"
    yield _block({"evaluation": {"methods": [choice]}})
    yield "As the merge that learning starts from:"
    yield _block({"coefficients": {"initial_merge": choice, "constraint": "free"}})
    yield (
        f"[Reference](../reference/methods.md): the function `adamerge_jax.methods.{name}`, its "
        "details, and how it departs from the authors' code."
    )


def _use_of_preset(name: str) -> Iterator[str]:
    yield "## Use it"
    yield f"    adamerge learn recipe.yaml --preset {name}"
    yield "or in the recipe"
    yield _block({"preset": name})
    yield "which stands for these fields, each of which the recipe may give otherwise:"
    yield f"```yaml\n{_preset(name)[1].strip()}\n```"


def recipes(name: str) -> list[str]:
    """Returns the recipes and parts of recipes on a method's page, as YAML."""
    return re.findall(r"```yaml\n(.*?)```", use_of(name), re.DOTALL)


def _options(name: str) -> dict[str, object]:
    """Returns a method's options at their defaults, where they are plain values."""
    parameters = inspect.signature(METHODS[name]).parameters
    return {
        option: parameter.default
        for option, parameter in parameters.items()
        if parameter.default is not None
    }


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()


def _block(fields: dict[str, object]) -> str:
    return f"```yaml\n{yaml.safe_dump(fields, sort_keys=False)}```"


def _preset(name: str) -> tuple[str, str]:
    """Returns the comment that a preset's file begins with, in one line, and its fields."""
    file = resources(presets).joinpath(f"{name}.yaml")
    lines = file.read_text(encoding="utf-8").splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:length])
    return comment, "\n".join(lines[length:])


class _Table(NamedTuple):
    """A table of the page of measurements.

    Attributes:
        headings: The headings that it stands under, the section's first.
        titles: The titles of its columns.
        rows: The cells of its rows.
    """

    headings: list[str]
    titles: list[str]
    rows: list[list[str]]


def measured(name: str) -> Iterator[str]:
    """Yields the rows on a method, each table with its rows of the base and the experts.

    A picture shows the method's score among those of the whole table.

    The figures are those of the page of measurements, and nothing but them.
    """
    told = False
    for headings, titles, rows in _tables(MEASURED.read_text(encoding="utf-8")):
        if not any(f"`{name}`" in row[0] for row in rows):
            continue
        shown = [
            row
            for row in rows
            if f"`{name}`" in row[0] or row[0].startswith(("base", "experts (one"))
        ]
        filled = [i for i, title in enumerate(titles) if i == 0 or any(row[i] for row in shown)]
        lines = [titles, ["---"] * len(titles), *shown]
        table = "\n".join("| " + " | ".join(line[i] for i in filled) + " |" for line in lines)
        anchor = slugify(headings[-1], "-")
        yield f"[{': '.join(headings)}](../guides/measured.md#{anchor})"
        if chart := charts.score_line(titles, rows, name):
            yield chart
        yield table
        told = True
    if not told:
        yield "No figure of this one is in [Measured](../guides/measured.md) yet."


def _tables(markdown: str) -> Iterator[_Table]:
    headings: list[str] = []
    for block in re.split(r"\n\n+", markdown):
        if heading := re.match(r"#(#+) (.*)", block):
            headings = [*headings[: len(heading[1]) - 1], heading[2].strip()]
        lines = block.splitlines()
        if len(lines) > 2 and all(line.startswith("|") for line in lines):
            titles, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
            yield _Table(headings, titles, rows)
