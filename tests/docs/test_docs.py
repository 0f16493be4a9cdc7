"""The site builds without a warning, and says all that it is to say."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import adamerge_jax
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import GRANULARITIES
from adamerge_jax.interference import STEPS
from adamerge_jax.objectives import OBJECTIVES
from adamerge_jax.objectives.regularizers import REGULARIZERS
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


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for each in re.findall(
        r"recipes\.(\w+)", str([f.annotation for f in model.model_fields.values()])
    ):
        yield from sections(getattr(adamerge_jax.recipes.schema, each))


def test_pages_ask_no_other_host(site: Path):
    for page in site.rglob("*.html"):
        loaded = (
            r"<(?:script|img|iframe)[^>]*src=\"([^\"]*)|<link[^>]*stylesheet[^>]*href=\"([^\"]*)"
        )
        for addresses in re.findall(loaded, page.read_text()):
            assert "//" not in "".join(addresses), page


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
    for name in (*GRANULARITIES, *CONSTRAINTS, *STEPS):
        assert name in granularities
    objectives = words(site / "guides" / "objectives.html").split()
    for name in (*OBJECTIVES, *REGULARIZERS):
        assert name in objectives
    presets = (site / "guides" / "presets.html").read_text()
    for name in PRESETS:
        assert f"<code>{name}</code>" in presets


def test_every_public_name_is_in_the_reference(site: Path):
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in adamerge_jax.__all__:
        assert re.search(
            rf'id="adamerge_jax\.([\w.]+\.)?{name}"|<code>adamerge_jax.{name}</code>', pages
        )


def test_the_whole_readme_is_on_the_site(site: Path):
    pages = "".join(words(page) for page in site.rglob("*.html"))
    readme = (ROOT / "README.md").read_text()
    for paragraph in re.sub(r"```.*?```", "", readme, flags=re.DOTALL).split("\n\n"):
        first = re.match(r"[A-Z][\w ,]{20,}", paragraph)
        if first:
            assert first[0] in pages
