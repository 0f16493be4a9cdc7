import ast
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.interference import FittedStep
from adamerge_jax.pipeline import provenance
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.provenance import hub_datasets, model_origins
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.report.markdown import in_markdown
from adamerge_jax.report.model_card import Origin, model_card, shared_license
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import Row
from tests.report.hostile import HOSTILE
from tests.report.saved_runs import COEFFICIENTS

BASE = Origin("base", "org/base", "v1", True, "mit")
CAT = Origin("cat", "org/cat", None, True, "mit")
DOG = Origin("dog", "experts/dog", None, False, "mit")
ROWS = [Row("base", {"cat": 0.5, "dog": 0.25}), Row("learned (tensor)", {"cat": 0.9, "dog": 0.8})]


def card(
    *origins: Origin, rows: list[Row] = ROWS, coefficients: Coefficients = COEFFICIENTS, **options
) -> ModelCard:
    chosen = dict(datasets=["org/data"], auto_class="AutoModelForImageClassification")
    chosen |= dict(task_folders=["cat", "dog"]) | options
    return ModelCard(
        model_card(coefficients, Results(rows, measure_outcome(rows)), origins=origins, **chosen)
    )


def test_metadata():
    data = card(BASE, CAT, DOG).data
    assert data.base_model == ["org/base", "org/cat"]  # what is on the Hub
    assert data.get("base_model_relation") == "merge"
    assert data.library_name == "transformers"
    assert data.tags == ["merge", "adamerge_jax"]
    assert data.license == "mit"
    assert data.datasets == ["org/data"]
    assert data.pipeline_tag == "image-classification"


def test_nothing_is_claimed_that_is_not_known():
    local = [own._replace(on_hub=False, license=None) for own in (BASE, CAT, DOG)]
    found = card(*local, rows=[], datasets=[])
    for field in ("base_model", "base_model_relation", "license", "datasets"):
        assert found.data.get(field) is None
    assert "names no licence" in found.text
    assert "Accuracy" not in found.text


@pytest.mark.parametrize(
    ("licenses", "shared"),
    [
        (["mit", "mit", "mit"], "mit"),
        (["mit", "apache-2.0", "mit"], "other"),
        (["mit", None, "mit"], None),
        (["mit", None, "apache-2.0"], None),
    ],
)
def test_licences(licenses, shared):
    origins = [
        own._replace(license=license)
        for own, license in zip((BASE, CAT, DOG), licenses, strict=True)
    ]
    assert shared_license(origins) == shared
    found = card(*origins)
    assert found.data.license == shared
    if shared == "other":
        assert found.data.get("license_name") == "mit-and-apache-2.0"
    for origin in origins:
        assert f"- {origin.name}: {origin.license or 'none named'}" in found.text


def test_the_text():
    text = card(BASE, CAT, DOG).text
    assert "[`org/base`](https://huggingface.co/org/base) at `v1`" in text
    assert "- dog: `experts/dog`" in text
    assert "| learned (tensor) | 90.0 | 80.0 | 85.0 |" in text
    assert 'from_pretrained("PATH", subfolder="tasks/cat")' in text
    # Of cat: 0.1, 0.2, 0.3, 0.4 in four tensors.
    assert "| cat | 0.250 | 0.112 | 0.100 | 0.400 |" in text
    assert "minimising entropy on examples of `org/data`" in text


def test_a_language_model():
    found = card(BASE, CAT, DOG, auto_class="AutoModelForCausalLM", task_folders=[])
    assert found.data.pipeline_tag == "text-generation"
    assert "AutoTokenizer" in found.text
    assert "subfolder" not in found.text


def test_licences_come_from_the_models_own_cards(image_recipe, tmp_path):
    tasks = list(image_recipe["tasks"])
    for name, text in {
        "base": "---\nlicense: apache-2.0\n---\n# A base\n",
        tasks[0]: "---\nlicense: other\nlicense_name: my-terms\n---\n",
    }.items():
        old = image_recipe["base"] if name == "base" else image_recipe["tasks"][name]["expert"]
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(old).iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "README.md").write_text(text)
        if name == "base":
            image_recipe["base"] = str(folder)
        else:
            image_recipe["tasks"][name]["expert"] = str(folder)
    origins = model_origins(open_models(parse_recipe(image_recipe), tmp_path), tmp_path)
    assert [own.license for own in origins] == ["apache-2.0", "my-terms", None]
    assert not any(own.on_hub for own in origins)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [a: b\n---\n")
    origins = model_origins(open_models(parse_recipe(image_recipe), tmp_path), tmp_path)
    assert origins[0].license is None


def test_data_sets_of_the_hub(tmp_path):
    (tmp_path / "images").mkdir()
    paths = ["org/b", "org/a", "images", "data.jsonl", "data.npz", "org/a"]
    tasks = {f"t{k}": {"expert": "e", "calibration": path} for k, path in enumerate(paths)}
    recipe = parse_recipe({"base": "b", "tasks": tasks})
    sources = [task.calibration for task in recipe.tasks.values()]
    assert hub_datasets(sources, tmp_path) == ["org/a", "org/b"]


class Parsed(NamedTuple):
    """A card as a reader of Markdown sees it.

    Attributes:
        blocks: The kinds of its blocks, in their order.
        inline: The kinds of what is in them, text and code apart.
        links: The addresses of links and pictures.
        code: The block of Python.
        data: The metadata.
    """

    blocks: list[str]
    inline: set[str]
    links: set[str]
    code: str
    data: dict[str, Any]


def parsed(content: str) -> Parsed:
    _, front, text = content.split("---\n", 2)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [token for block in tokens for token in block.children or []]
    links = {str(token.attrGet("href") or token.attrGet("src")) for token in inline if token.attrs}
    (fence,) = (token for token in tokens if token.type == "fence")
    kinds = {token.type for token in inline} - {"text", "text_special", "code_inline", "softbreak"}
    blocks = [token.type + token.tag for token in tokens]
    return Parsed(blocks, kinds, links, fence.content, yaml.safe_load(front))


HARMLESS = parsed(card(BASE, CAT, DOG).content)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_of_strangers_are_text(text):
    """Every name, licence, option and id in the card is hostile."""
    base, *experts = (
        origin._replace(name=f"{text} {number}", source=text, revision=text, license=text)
        for number, origin in enumerate((BASE, CAT, DOG))
    )
    tasks = [expert.name for expert in experts]
    rows = [
        Row(text, dict.fromkeys(tasks, 0.5)),
        Row("experts", dict.fromkeys(tasks, 0.9), kind="experts"),
        Row(text, dict.fromkeys(tasks, 0.8), kind="learned"),
    ]
    coefficients = replace(
        COEFFICIENTS,
        experts=tuple(replace(e, name=n) for e, n in zip(COEFFICIENTS.experts, tasks, strict=True)),
        granularity=text,
        constraint=text,
        objective=text,
        interference=(FittedStep(text, {text: text}, None),),
        scaled={text: 0.5},
    )
    content = model_card(
        coefficients,
        Results(rows, measure_outcome(rows)),
        tasks,
        origins=[base, *experts],
        auto_class="AutoModelForImageClassification",
        datasets=[text],
    )
    found = parsed(content)
    harmless = [*ROWS[:1], Row("experts", {"cat": 1.0, "dog": 1.0}, kind="experts"), ROWS[1]]
    options = dict(interference=(FittedStep("a", {}, None),), scaled={"cat": 0.5})
    alike = card(BASE, CAT, DOG, rows=harmless, coefficients=replace(COEFFICIENTS, **options))
    assert found.blocks == parsed(alike.content).blocks
    assert found.inline <= {"link_open", "link_close", "strong_open", "strong_close"}
    assert found.links <= {"https://huggingface.co/www.example.org"}
    assert max(map(len, content.splitlines())) < 2000
    assert all(character.isprintable() or character == "\n" for character in content)
    # Loading is one call with strings, in a language in which more could be done.
    statements = ast.parse(found.code).body
    assert [type(statement) for statement in statements] == [ast.ImportFrom, ast.Assign]
    assert all(isinstance(k.value, ast.Constant) for k in statements[1].value.keywords)
    assert isinstance(statements[1].value.func.value, ast.Name)
    # The metadata have what every card has, and text only where it is an identifier.
    known = {"library_name", "tags", "pipeline_tag", "license", "license_name"}
    known |= {"base_model", "base_model_relation", "datasets"}
    assert found.data.keys() <= known
    assert found.data["library_name"] == "transformers"
    assert found.data["tags"] == ["merge", "adamerge_jax"]
    if re.fullmatch(r"[\w.+-]+", text, re.ASCII) is None:
        assert found.data["license"] == "other"
        assert found.data.keys() == {"library_name", "tags", "pipeline_tag", "license"}
    # A card that is read and written again, as tools of the Hub do, says the same.
    assert ModelCard(content).data.to_dict() == found.data


@pytest.mark.parametrize("license", HOSTILE, ids=range(len(HOSTILE)))
def test_a_licence_from_a_models_own_card(license, tmp_path):
    """The way of the text from an expert's README.md to the merge's."""
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': license})}---\n")
    checkpoint = SimpleNamespace(folder=tmp_path)
    named = provenance._license(checkpoint)
    found = parsed(card(BASE._replace(license=named), CAT, DOG).content)
    assert found.blocks == HARMLESS.blocks
    assert found.data["license"] == "other"


@pytest.mark.parametrize("name", ["sst2_v1", "Qwen 2.5", "learned (row)", "100%", "-0.5", "\u4e2d"])
def test_plain_names_stay_plain(name):
    assert in_markdown(name) == name


@pytest.mark.parametrize(
    "name", ["_a_", "a__b", "a.b", "a:b", "2) b", "2.", "a*", "a|b", "-a", "#1"]
)
def test_what_could_mean_something_is_code(name):
    assert in_markdown(name) == f"`{name.replace('|', chr(0xA6))}`"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: mit\n---", "mit"),
        ("---\nlicense: other\nlicense_name: mine\n---\n", "mine"),
        ("---\nmodel-index: 3\neval_results: 4\nlicense: mit\n---\n", "mit"),
        ("---\nself: 3\n1: x\nlicense: mit\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\nlicense: [a: b\n---\n", None),
        ("---\nlicense: " + "[" * 2000 + "\n---\n", None),
        ("# A model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
        (b"---\nlicense: \xff\n---\n", None),
    ],
)
def test_metadata_of_strangers_never_end_a_run(text, named, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "README.md").write_bytes(content)
    assert provenance._license(SimpleNamespace(folder=tmp_path)) == named


def test_a_method_is_text_too():
    content = model_card(
        None,
        None,
        [],
        origins=[BASE, CAT],
        auto_class="AutoModelForCausalLM",
        method="<b>mine</b> ([x](https://example.org))",
    )
    assert parsed(content).inline == {"link_open", "link_close"}
    assert parsed(content).links == {f"https://huggingface.co/{o.source}" for o in (BASE, CAT)}
    assert "method `<b>mine</b> ([x](https://example.org))`, which" in content


def test_a_warning_of_coefficients_out_of_reach():
    far = {name: values * 1e9 for name, values in COEFFICIENTS.values.items()}
    text = card(BASE, CAT, DOG, coefficients=replace(COEFFICIENTS, values=far)).text
    assert "**Warning**: 8 of 8 coefficients are outside of -2 to 3, the farthest of `dog`" in text
    assert "Warning" not in card(BASE, CAT, DOG).text


def test_the_outcome_is_in_the_card():
    rows = [*ROWS[:1], Row("experts", {"cat": 1.0, "dog": 1.0}, kind="experts"), ROWS[1]]
    text = card(BASE, CAT, DOG, rows=rows).text
    assert "reaches 85.0% on average: 85.0% of the experts' average. It closes 76%" in text
    assert "from `base`, the best row without learning" in text
