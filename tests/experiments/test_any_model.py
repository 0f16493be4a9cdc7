"""The table of all model types: tiny models are made, and its sums are those of its results."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("tiny_models", "tiny_inputs", "any_model_table")
    modules = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


@pytest.mark.parametrize(
    "model_type, inputs",
    [
        ("bamba", {"input_ids", "attention_mask"}),  # mixers of states, of widths of their own
        ("esm", {"input_ids", "attention_mask"}),  # no vocabulary by default
        ("detr", {"pixel_values"}),  # a backbone of another package by default
        ("qwen2_vl", {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}),
    ],
)
def test_a_tiny_model_of_a_type_reads_its_inputs(scripts, model_type, inputs):
    kinds = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",)
    model_class = scripts["tiny_models"].model_class(model_type, kinds)
    tiny_inputs = scripts["tiny_inputs"].tiny_inputs
    model = scripts["tiny_models"].tiny_model(model_type, model_class, accepts=tiny_inputs)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    given = tiny_inputs(model)
    assert inputs <= given.keys()
    if model_type == "qwen2_vl":
        assert (given["input_ids"] == model.config.image_token_id).sum() == 8  # 2 images of 4
    with torch.no_grad():
        model(**given)


def test_the_page_counts_and_lists(scripts):
    table = scripts["any_model_table"]
    versions = {"transformers": "5.1", "torch": "2.9"}
    equal = {"made": True, "folds": "equal", "learns": "equal", **versions}
    equal |= {"difference": 1e-7, "compile": 2.0}
    texts = {"modalities": ["text"], "inputs": ["input_ids"]}
    both = {"modalities": ["image", "text"]}
    results = [
        {"type": "a", **texts, **equal, "way": "own"},
        {"type": "b", **texts, **equal, "way": "bridge", "learns": "differs", "difference": 0.02},
        {"type": "c", **both, **equal, "way": "bridge", "inputs": ["input_ids", "pixel_values"]},
        {"type": "d", **both, **equal, "way": "bridge", "inputs": ["input_ids"]},
        {
            "type": "e",
            "made": False,
            "modalities": ["image"],
            "reason": "9 M parameters",
            **versions,
        },
        {"type": "j", **texts, **equal, "way": "whole", "recipe": "it has no body"},
        {"type": "f", **texts, **equal, "folds": "fails: /tmp/tmpi29_x8ab/x_y", "way": "whole"},
        *(
            table.timed_out({"type": name, "modalities": ["text", "audio"], **stages}, 120)
            | versions
            for name, stages in {
                "g": {"made": True},
                "h": {"made": True, "folds": "equal"},
                "i": {"made": False},
            }.items()
        ),
    ]
    lines = table.page(results, count=14)
    assert "| text | 4 | 4 | 3 | 1 | 0 | 2 | 3 (75%) |" in lines
    assert "| image-text | 2 | 2 | 2 | 0 | 2 | 0 | 2 (100%) |" in lines
    assert "| other | 3 | 2 | 1 | 0 | 0 | 0 | 0 (0%) |" in lines
    assert "| all | 10 | 8 | 6 | 1 | 2 | 2 | 5 (62%) |" in lines
    assert "- `f`: fails: x\\_y" in lines
    assert "- `b`: by bridge, 2e-02 from PyTorch's" in lines
    for names in ("`g`", "`g`, `h`", "`i`"):  # do not fold, do not learn, are not made
        assert f"- {names}: no result within the time limit" in lines
    place = lines.index("## Learned by the Python API alone")
    assert lines[place + 2] == "- `j`: it has no body"
    assert "- `e`: 9 M parameters" in lines
    assert "- **bridge**: `c`, `d` (texts alone)" in lines
    assert any("The other 4 were not run." in line for line in lines)
    assert any("4 types, with `transformers` 5.1 and `torch` 2.9." in line for line in lines)


def test_the_page_is_that_of_the_file_of_results(scripts, tmp_path):
    table = scripts["any_model_table"]
    file = SCRIPTS / "any_model.jsonl"
    results = table.read(file)
    page = SCRIPTS.parents[1] / "docs" / "guides" / "model_types.md"
    lines = table.page(list(results.values()), len(results))
    assert page.read_text().splitlines() == lines
    table.write(tmp_path / "again.jsonl", reversed(results.values()))
    assert (tmp_path / "again.jsonl").read_text() == file.read_text()
