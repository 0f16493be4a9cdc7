"""The site builds without a warning, and says all that it is to say."""

import html
import re
from pathlib import Path

import pytest
import yaml

import adamerge_jax
from adamerge_jax import parse_recipe
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import GRANULARITIES
from adamerge_jax.interference import STEPS
from adamerge_jax.methods import METHODS
from adamerge_jax.objectives import OBJECTIVES
from adamerge_jax.objectives.regularizers import REGULARIZERS
from adamerge_jax.recipes.json_schema import sections
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import Recipe

mkdocs = pytest.importorskip("mkdocs.__main__")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("site")
    options = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    done = CliRunner().invoke(mkdocs.cli, [*options, "--site-dir", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def words(page: Path) -> str:
    return html.unescape(re.sub("<[^>]*>", "", page.read_text()))


def test_pages_ask_no_other_host(site: Path):
    for page in site.rglob("*.html"):
        loaded = (
            r"<(?:script|img|iframe)[^>]*src=\"([^\"]*)|<link[^>]*stylesheet[^>]*href=\"([^\"]*)"
        )
        for addresses in re.findall(loaded, page.read_text()):
            assert "//" not in "".join(addresses), page


def test_search_works_from_a_folder(site: Path):
    """Where browsers neither start workers nor read files that a page has not named."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = {")
    for page in site.rglob("*.html"):
        (script,) = re.findall(r'<script src="([^"]*iframe-worker.js)"', page.read_text())
        assert (page.parent / script).is_file() or page.name == "404.html"


def test_no_marker_is_left(site: Path):
    for page in site.rglob("*.html"):
        assert "{{ " not in words(page), page


def test_every_field_of_a_recipe_is_described(site: Path):
    page = (site / "guides" / "recipe.html").read_text()
    for model in sections(Recipe):
        table = page.partition(f'id="{model.__name__}"')[2].partition("<h2")[0]
        for name, field in model.model_fields.items():
            assert f"<code>{name}</code>" in table
            first = html.escape((field.description or "").split("\n")[0], quote=False)
            assert first in html.unescape(table) or first in table


def test_every_choice_is_in_the_guides(site: Path):
    granularities = words(site / "guides" / "granularities.html").split()
    for name in (*GRANULARITIES, *CONSTRAINTS):
        assert name in granularities
    interference = words(site / "guides" / "interference.html").split()
    for name in STEPS:
        assert name in interference
    methods = words(site / "guides" / "methods.html").split()
    for name in METHODS:
        assert name in methods
    objectives = words(site / "guides" / "objectives.html").split()
    for name in (*OBJECTIVES, *REGULARIZERS):
        assert name in objectives
    presets = (site / "guides" / "presets.html").read_text()
    for name in PRESETS:
        assert f"<code>{name}</code>" in presets


def test_every_choice_is_in_the_reference(site: Path):
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    choices = (GRANULARITIES, STEPS, METHODS, OBJECTIVES, REGULARIZERS)
    for name in (name for registry in choices for name in registry):
        assert re.search(rf'id="adamerge_jax\.[\w.]+\.{name}"', pages), name


def test_every_notebook_is_a_page_with_its_pictures(site: Path):
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        pictures = re.findall(rf'<img alt="picture \d+" src="({notebook.stem}-\d+\.png)"', page)
        assert len(pictures) == notebook.read_text().count('"image/png": "')
        assert all((site / "notebooks" / picture).stat().st_size for picture in pictures)


def test_every_public_name_is_in_the_reference(site: Path):
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in adamerge_jax.__all__:
        assert re.search(
            rf'id="adamerge_jax\.([\w.]+\.)?{name}"|<code>adamerge_jax.{name}</code>', pages
        )


README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
MINIMAL = {
    "base": "base",
    "tasks": {
        task: {"expert": task, "calibration": f"{task}.jsonl"} for task in ("trec", "sst2", "subj")
    },
}
"""The recipe that a fragment in a guide is added to."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_and_fragments_are_valid(page: Path):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        fields = yaml.safe_load(block)
        parse_recipe(fields if "base" in fields else MINIMAL | fields)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_the_readme_and_the_site_say_the_same(site: Path):
    pages = "".join(words(page) for page in site.rglob("*.html"))
    for command in re.findall(r"^    (\S.*)", README, re.MULTILINE):
        assert command.partition("  #")[0] in pages
    measured = (ROOT / "docs" / "guides" / "measured.md").read_text()
    results = re.findall(r"\|((?: [\d.]+ \|){6}) \**([\d.]+)\** \|$", README, re.MULTILINE)
    assert len(results) == 6
    for tasks, average in results:
        assert re.search(rf"{re.escape(tasks)} \**{average} ", measured)
