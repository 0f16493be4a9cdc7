import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from adamerge_jax.cli import main as cli
from adamerge_jax.report.page import write_page
from adamerge_jax.report.rendering import _breakable
from adamerge_jax.runs.predictions import (
    Difference,
    Mistake,
    TaskPredictions,
    write_predictions,
)
from tests.report.hostile import HOSTILE
from tests.report.saved_runs import (
    ALL,
    COEFFICIENTS,
    STEPS,
    TASKS,
    step,
    write_run,
    write_steps,
)

VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}


class Page(HTMLParser):
    """A page's tables and texts; fails where a tag is not closed."""

    def __init__(self, file: Path):
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self._row: list[str] = []
        self._caption = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[key] for key in ("src", "href", "action") if key in found]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        if tag == "section":
            self._section = found.get("id", "missing")
            self.sections[self._section] = ""
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self._row = []
        if tag in ("th", "td"):
            assert tag == "td" or found["scope"] in ("row", "col")
            self._row.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self._caption] = {}
        if tag == "tr":
            name, *cells = self._row
            self.tables[self._caption][name] = cells

    def handle_data(self, text):
        if self._section:
            self.sections[self._section] += text
        if "caption" in self.open:
            self._caption += text
        elif "th" in self.open or "td" in self.open:
            self._row[-1] += text


def page(folder: Path) -> Page:
    return Page(write_page(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Page, Path]:
    folder = write_run(tmp_path_factory.mktemp("run"), *ALL, keep_from_base=["*.bias"])
    return page(folder), folder


def test_it_asks_nobody_for_anything(finished):
    found, _ = finished
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert not re.search(r"@import|url\(|<script[^>]", found.source)
    (script,) = re.findall(r"<script>(.*?)</script>", found.source, re.DOTALL)
    assert not re.search(r"fetch|http|import|src|innerHTML|eval", script)
    # What names could smuggle in would not run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f"default-src 'none'; img-src data:; {allowed}" in found.source
    for address in found.addresses:
        if address.startswith("#"):
            assert address[1:] in found.sections


def test_every_picture_says_what_it_shows(finished):
    found, folder = finished
    assert len(found.images) == 5  # a map and curves of each of two experts, curves of both
    for image in found.images:
        assert image["src"].startswith("data:image/svg+xml;base64,")
        assert any(task in image["alt"] for task in (*TASKS, "all tasks"))
    assert "goes from 2.000 at step 0 to 1.100 at step 4" in found.source
    assert "all tasks: its held-out objective goes from 4.000 at step 0 to 2.200" in found.source
    assert "The coefficients of step 2 were kept" in found.source
    names = [f"{kind}-{task}" for kind in ("coefficients", "curves") for task in TASKS]
    files = sorted(folder.glob("report/*"))
    names += ["similarity", "total-curves"]
    assert [file.name for file in files] == sorted(f"{name}.png" for name in names)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200


def test_results(finished):
    found, _ = finished
    table = found.tables["Accuracy (%)"]
    assert table["method"] == ["cat", "dog", "average"]
    assert table["experts (one model each)"] == ["90.0", "90.0", "90.0"]
    assert table["learned (tensor)"] == ["80.0★", "60.0★", "70.0★"]
    assert table["base"] == ["20.0", "30.0", "25.0"]
    beside = found.tables["The merge beside the experts"]
    # By hand: 80, 60 and 70 of 90; 30 of 40, 10 of 40, 20 of 40 points.
    assert beside["task"] == ["share of the experts' score", "gap closed"]
    assert beside["cat"] == ["88.9%", "75%"]
    assert beside["dog"] == ["66.7%", "25%"]
    assert beside["average"] == ["77.8%", "50%"]
    assert "closes 50% of the gap from task arithmetic (0.3)" in found.source
    assert "missing" not in found.sections


def test_coefficients(finished):
    table = finished[0].tables["Mean coefficient by layer and expert"]
    assert table["layer"] == list(TASKS)
    assert table["vit.embeddings"] == ["0.10", "1.50"]
    assert table["vit.encoder.layer.1"] == ["0.30", "-0.50"]
    spread = finished[0].tables["All coefficients of an expert"]
    assert spread["dog"] == ["0.000", "1.118", "-1.500", "1.500"]


def test_the_spread_in_a_layer_is_drawn_and_what_never_moved_is_empty(tmp_path):
    folder = write_run(tmp_path, *ALL)
    values = {name: np.full((2, 8), 0.3, np.float32) for name in COEFFICIENTS.values}
    values["vit.embeddings.cls_token"] = np.full(2, 0.3, np.float32)  # a table is not split
    values["vit.encoder.layer.0.output.dense.weight"][0] = np.linspace(0.2, 0.6, 8)
    shapes = dict.fromkeys(values, (8, 8))
    changed = replace(COEFFICIENTS, values=values, shapes=shapes, granularity="row", initial=0.3)
    changed.save(folder / "coefficients.safetensors")
    found = page(folder)
    table = found.tables["Mean coefficient by layer and expert"]
    assert table["vit.encoder.layer.0"] == ["0.40", ""]
    assert table["vit.encoder.layer.1"] == ["", ""]
    assert found.source.count('<svg class="strip"') == 1
    assert "eight of ten coefficients are from 0.24 to 0.56" in found.source
    assert "Colours are around 0.3, where all started" in found.sections["coefficients"]


def test_the_page_says_what_it_is_of(finished, tmp_path):
    found, folder = finished
    digest = hashlib.sha256((folder / "recipe.yaml").read_bytes()).hexdigest()
    made_of = found.tables["What it was made of"]
    assert made_of["recipe"] == ["pets", f"sha256:{digest[:12]}"]
    assert made_of["base"] == ["org/base", "sha256:0"]
    record = json.loads((write_run(tmp_path, *ALL) / "run.json").read_text())
    record |= {"started": "2026-02-03T04:05:06+00:00", "command": "adamerge learn pets.yaml"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    source = page(tmp_path).source.replace("<wbr>", "")
    assert "2026-02-03 04:05:06 UTC" in source and "adamerge learn pets.yaml" in source


def test_coefficients_out_of_reach(finished, tmp_path):
    assert "Warning" not in finished[0].sections["coefficients"]
    folder = write_run(tmp_path, *ALL)
    far = {name: values * 1e9 for name, values in COEFFICIENTS.values.items()}
    replace(COEFFICIENTS, values=far).save(folder / "coefficients.safetensors")
    text = page(folder).sections["coefficients"]
    assert "Warning: 8 of 8 coefficients are outside of -2 to 3, the farthest of dog" in text


def test_similarity(finished):
    tables = finished[0].tables
    overall = tables["Cosine between experts, all merged parameters"]
    assert overall["cat"] == ["1", "0.37"]
    assert tables["vit.encoder.layer.0"]["dog"] == ["-0.21", "1"]
    by_layer = tables["Mean cosine to the other experts, by layer"]
    assert by_layer["vit.encoder.layer.0"] == ["-0.21", "-0.21"]
    assert by_layer["vit.layernorm"] == ["\N{EN DASH}"] * 2
    assert tables["Length of the task vectors"]["norm"] == ["1.25", "2.5"]


def test_disagreement_before_and_after(finished):
    found, _ = finished
    table = found.tables["Part of the held-out examples"]
    assert table["cat"] == ["10", "75.0%", "25.0%"]
    text = " ".join(found.sections["disagreement"].split())
    assert "of cat are compared with the classes that the expert gives" in text
    assert "of dog are compared with the labels" in text
    assert "kept, of step 2" in text


def test_what_was_kept_from_the_base(finished):
    text = " ".join(finished[0].sections["base"].split())
    assert "1,234,567 parameters in 4 tensors" in text
    assert "vit.encoder.layer.*.layernorm.bias (2 tensors)" in text
    assert "no expert changed themvit.pooler.dense.weight" in text


def test_cost(finished):
    table = finished[0].tables["What the run took"]
    assert table["coefficients"] == ["8"]
    assert table["examples to learn from"] == ["180"]
    assert table["steps"] == ["4"]
    assert table["steps per second (median)"] == ["4"]
    assert table["time: all of it"] == ["21.5 s"]
    assert table["peak memory of the process"] == ["2.5 GB"]


def test_the_same_run_gives_the_same_page(finished):
    found, folder = finished
    assert page(folder).source == found.source


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ([], ["No coefficients", "not come to its end", "no metrics.jsonl", "no run.json"]),
        (["metrics"], ["step 4 of 4 was the last", "not come to its end", "no run.json"]),
        (["coefficients", "record"], ["not come to its end", "no metrics.jsonl"]),
    ],
)
def test_what_is_missing_is_named(parts, missing, tmp_path):
    text = page(write_run(tmp_path, *parts)).sections["missing"]
    assert all(each in text for each in missing)
    assert text.count("No ") == len(missing)


def test_without_test_data(tmp_path):
    tasks = {
        task: {"expert": f"experts/{task}", "calibration": f"data/{task}.npz"} for task in TASKS
    }
    folder = write_run(tmp_path, tasks=tasks)
    assert "the recipe names no test data" in page(folder).sections["missing"]


def test_a_loss_is_the_better_the_lower_it_is(tmp_path):
    folder = write_run(tmp_path, "results")
    file = folder / "results.json"
    file.write_text(file.read_text().replace('"accuracy"', '"loss"'))
    found = page(folder)
    table = found.tables["Loss (nats per token)"]
    assert table["base"] == ["0.200★", "0.300★", "0.250★"]
    beside = found.tables["The merge beside the experts"]
    assert {cells[1] for task, cells in beside.items() if task != "task"} == {"\N{EN DASH}"}
    text = found.sections["results"]
    assert "of losses, over 100% is worse" in text
    assert "from base, the best row on average without learning" in text


def test_agreement_that_was_not_measured(tmp_path):
    folder = write_run(tmp_path)
    write_steps(folder, [step(0, (2.0, None)), step(1), step(2, (1.0, None))])
    assert "Not measured" in page(folder).sections["disagreement"]


def test_curves_of_coarse_coefficients_come_first(tmp_path):
    chosen = {"granularity": "tensor", "coarse": {"granularity": "layer", "steps": 2}}
    folder = write_run(tmp_path, coefficients=chosen)
    write_steps(folder, [*STEPS[:3], *STEPS])
    text = page(folder).sections["curves"]
    assert text.index("Coarse coefficients") < text.index("Learning", text.index("Coarse"))
    assert (folder / "report" / "curves-coarse-0-cat.png").is_file()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vit.layer.0.weight", "vit.|layer.|0.|weight"),
        ("task arithmetic (0.25)", "task arithmetic (0.25)"),
        ("a/b_c", "a/|b_|c"),
        ("x" * 50, f"{'x' * 24}|{'x' * 24}|xx"),
        ("<i>.</i>", "&lt;i&gt;.|&lt;/|i&gt;"),
        ("", ""),
    ],
)
def test_where_names_are_broken(name, shown):
    assert _breakable(name) == shown.replace("|", "<wbr>")


class Markup(HTMLParser):
    """The tags of a page with the names of their attributes, breaks of words apart."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        if tag != "wbr":
            self.tags.append((tag, *(name for name, _ in attributes)))


def renamed(tree, names: dict[str, str]):
    """The same lists and dictionaries with other strings, also as keys."""
    if isinstance(tree, dict):
        return {renamed(key, names): renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [renamed(entry, names) for entry in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


@pytest.mark.parametrize("task", [" ".join(HOSTILE), "$x_{$", "../../outside", "x" * 5000])
def test_names_are_text_and_no_markup(task, finished, tmp_path):
    """A run folder in which everything that can be named has a hostile name."""
    folder = tmp_path / "run"
    write_run(folder, *ALL, keep_from_base=["*.bias"])
    hostile = " ".join(HOSTILE)
    names = {"cat": task, "dog": f"{task}'", "vit.layernorm": f"{hostile}.1", "pets": hostile}
    names |= dict.fromkeys(("org/base", "1 x cpu (cpu)", "task arithmetic (0.3)", "jax"), hostile)
    for file in ("run.json", "results.json"):
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(renamed(fields, names)))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    changed = [json.dumps(renamed(json.loads(line), names)) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    recipe = renamed(yaml.safe_load((folder / "recipe.yaml").read_text()), names)
    for fields in recipe["tasks"].values():
        fields |= {"class_names": HOSTILE, "templates": HOSTILE}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    experts = tuple(
        replace(expert, name=names[expert.name], source=hostile) for expert in COEFFICIENTS.experts
    )
    coefficients = replace(COEFFICIENTS, experts=experts, objective=hostile)
    coefficients.save(folder / "coefficients.safetensors")
    found = page(folder)
    assert Markup(found.source).tags == Markup(finished[0].source).tags
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert all(character.isprintable() or character == "\n" for character in found.source)
    assert "&lt;script&gt;" in found.source
    assert len(list(folder.glob("report/*.png"))) == 6
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_names_and_texts_of_predictions_are_text(tmp_path):
    def shown(name: str) -> Page:
        one = Difference(index=3, label=0, expert=0, merge=1, text=name, image="iVBORw0=")
        counts = [Mistake(label=0, merge=label, count=2) for label in range(2)]
        of_task = TaskPredictions(
            class_names=[f"{name} {position}" for position in range(2)],
            counts=counts,
            differing=1,
            differences=[one],
        )
        write_predictions({name: of_task}, folder / "predictions.json")
        return page(folder)

    folder = write_run(tmp_path)
    plain, hostile = shown("a rather long name"), shown(" ".join(HOSTILE))
    assert "examples of" in plain.sections["disagreement"]
    assert Markup(hostile.source).tags == Markup(plain.source).tags
    assert all(character.isprintable() or character == "\n" for character in hostile.source)


def test_the_command(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    cli.main(["report", str(folder)])
    assert capsys.readouterr().out.strip() == f"report {folder / 'report.html'}"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no run folder" in capsys.readouterr().err
