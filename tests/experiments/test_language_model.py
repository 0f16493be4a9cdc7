"""The language-model experiment, with hardly any text and hardly any training."""

import json
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.references import load_script

SIZES = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96}
EXPERIMENT = Path(__file__).parents[2] / "experiments" / "language_model.py"


def test_runs_from_text_to_the_merged_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    experiment = load_script(EXPERIMENT)
    monkeypatch.setattr(experiment, "CHARACTERS", 100_000)
    monkeypatch.setattr(experiment, "BASE_STEPS", 10)
    monkeypatch.setattr(experiment, "EXPERT_STEPS", 25)
    monkeypatch.setattr(experiment, "LENGTH", 32)
    monkeypatch.setattr(experiment, "BATCH_SIZE", 4)
    smaller = LlamaConfig(**experiment.CONFIG.to_dict() | SIZES)
    monkeypatch.setattr(experiment, "CONFIG", smaller)
    monkeypatch.setitem(experiment.COEFFICIENTS["granularity_options"], "pieces", 128)
    # Both kinds of experts are trained; one merge is enough.
    monkeypatch.setattr(experiment, "KINDS", ("lora",))
    monkeypatch.setattr(experiment, "LEARNING", {"batch_size": 2, "steps": 2, "examples": 6})
    out = tmp_path / "made"
    monkeypatch.setattr(sys, "argv", ["language_model.py", "--out", str(out)])
    experiment.main()
    for kind in experiment.KINDS:
        rows = json.loads((out / f"run-{kind}" / "results.json").read_text())["rows"]
        assert [row["metric"] for row in rows] == ["loss"] * 5
        assert [set(row["tasks"]) for row in rows] == [set(experiment.DOMAINS)] * 5
        # These steps are enough to tell what the experts learned from what the base knew.
        assert rows[1]["average"] < rows[0]["average"]
        merged = AutoModelForCausalLM.from_pretrained(out / f"run-{kind}" / "checkpoint")
        tokenizer = AutoTokenizer.from_pretrained(out / f"run-{kind}" / "checkpoint")
        ids = tokenizer("def main", return_tensors="pt").input_ids
        assert merged.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == len(ids[0]) + 3
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    adapted = PeftModel.from_pretrained(base, out / "lora" / "python")
    assert adapted.peft_config["default"].r == experiment.LORA_RANK
    assert {"lm_head", "embed_tokens"} <= set(adapted.peft_config["default"].target_modules)
    assert {file.stem for file in (out / "lm_eval").iterdir()} == set(experiment.DOMAINS)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the experts' average (less is better)." in printed


def test_no_text_is_in_two_parts():
    experiment = load_script(EXPERIMENT)
    corpus = experiment.read_corpus("c")
    paragraphs = [{p for text in part for p in text.split("\n\n")} for part in corpus]
    assert all(corpus)
    for number, part in enumerate(paragraphs):
        for other in paragraphs[number + 1 :]:
            assert not part & other
