"""Each method and preset has its page, and the page says what the code and the measurements say."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from adamerge_jax import parse_recipe
from adamerge_jax.methods import METHODS
from adamerge_jax.recipes.presets import PRESETS
from tests.docs.test_docs import MINIMAL

pytest.importorskip("mkdocs")

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [*METHODS, *PRESETS]


def hook(name: str) -> ModuleType:
    """A file of hooks, which mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        spec.loader.exec_module(module)
    return module


method_pages, formulas, charts = hook("method_pages"), hook("formulas"), hook("charts")


def test_every_method_and_preset_has_a_page_and_every_page_one():
    assert len(set(NAMES)) == len(NAMES)  # a page has one name for either
    assert sorted(page.stem for page in (DOCS / "methods").glob("*.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_a_formula_a_reason_and_the_parts_of_its_own_method(name: str):
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# `{name}`\n")
    assert "\n## When to take it\n" in page
    assert formulas.FORMULA.search(page)
    assert re.findall(r"^\{\{ (\w+) of (.*) \}\}$", page, re.MULTILINE) == [
        ("source", name),
        ("use", name),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_a_page_are_valid(name: str):
    blocks = method_pages.recipes(name)
    assert len(blocks) == 2
    for block in blocks:
        parse_recipe(MINIMAL | yaml.safe_load(block))


@pytest.mark.parametrize("name", METHODS)
def test_the_command_of_a_page_is_one_of_the_method(name: str):
    page = method_pages.use_of(name)
    command = re.search(r"^    (adamerge merge .*?--out merged)$", page, re.MULTILINE | re.DOTALL)
    words = shlex.split(command[1].replace("\\\n", " "))
    assert words[3:5] == ["--method", name]
    options = yaml.safe_load(words[6]) if words[5] == "--options" else {}
    METHODS[name](**options)  # refuses what it does not have


def test_figures_are_rows_of_the_page_of_measurements():
    lines = (DOCS / "guides" / "measured.md").read_text().splitlines()
    measured = [{cell.strip() for cell in line.split("|")} for line in lines]
    shown = [row for name in NAMES for row in rows_on("\n".join(method_pages.measured(name)))]
    assert len(shown) > len(METHODS)
    for row in shown:
        assert any(row <= cells for cells in measured), row


def rows_on(text: str) -> list[set[str]]:
    """The cells of each row that begins with the name of a method."""
    return [
        {cell.strip() for cell in line.split("|")}
        for line in text.splitlines()
        if line.startswith("|") and "`" in line.split("|")[1]
    ]


def test_a_formula_becomes_a_picture_that_says_what_it_shows(drawn_figures):
    with drawn_figures():
        drawn = formulas.drawn(r"\frac{a}{b} < c", "div")
        with pytest.raises(ValueError, match="nothing"):
            formulas.drawn(r"\nothing", "div")
    assert drawn.startswith('<div class="formula"><svg')
    assert r'aria-label="\frac{a}{b} &lt; c"' in drawn
    assert "<path" in drawn and "\n" not in drawn and "<style" not in drawn


TITLES = ["average accuracy (%)", "own heads"]
ROWS = [["base", "51.2"], ["`ties`", "65.8 ± 0.1"], ["`dare`", "64.3, 65.4"], ["experts (one)", ""]]


def test_a_line_of_scores_names_the_method_and_the_base(drawn_figures):
    with drawn_figures():
        chart = charts.score_line(TITLES, ROWS, "ties")
    assert 'aria-label="base 51.2, ties 65.8, among 3 rows of the table"' in chart
    assert chart.startswith('<div class="chart"><svg') and "\n" not in chart
    assert charts.score_line(TITLES, ROWS, "sce") is None
    assert charts.score_line(["method", "seconds"], ROWS, "ties") is None
