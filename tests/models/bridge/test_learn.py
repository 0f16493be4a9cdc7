"""Learning of an architecture without a family here, from a recipe to a checkpoint."""

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.func import functional_call
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RoFormerForSequenceClassification,
    RoFormerModel,
    ViTImageProcessorPil,
)

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge import torch_in_jax
from adamerge_jax.pipeline.example_loader import _image_shape
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.runs.files import COEFFICIENTS_FILE
from tests.models.bridge.tiny import TEXT_CONFIGS
from tests.references import (
    bert_tokenizer,
    fine_tune,
    learning_inputs,
    predictions,
    randomise,
    sentences,
    write_json_lines,
    write_recipe,
)

STEPS = 5
CLASSES = {"mood": 2, "topic": 3}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fields of a recipe for a RoFormer and an expert for each of `CLASSES`."""
    root = tmp_path_factory.mktemp("roformer")
    tokenizer = bert_tokenizer(root)
    make = TEXT_CONFIGS["roformer"]
    base = randomise(RoFormerModel(make(vocab_size=len(tokenizer))))
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tasks = {}
    for seed, (task, classes) in enumerate(CLASSES.items(), start=1):
        config = make(vocab_size=len(tokenizer), num_labels=classes)
        expert = fine_tune(RoFormerForSequenceClassification(config), base, seed)
        expert.save_pretrained(root / task)
        texts = sentences(16, seed)
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        encoded.pop("token_type_ids", None)
        labels = predictions(expert, encoded)
        rows = [{"text": t, "label": int(c)} for t, c in zip(texts, labels, strict=True)]
        file = write_json_lines(root / f"{task}.jsonl", rows)
        tasks[task] = {
            "expert": str(root / task),
            "calibration": str(file),
            "test": {"path": str(file), "label": "label"},
        }
    return {
        "preset": "adamerging",
        "base": str(root / "base"),
        "tasks": tasks,
        "heads": "refitted",
        "learning": {
            "steps": STEPS,
            "batch_size": 4,
            "evaluate_every": STEPS,
            "optimizer": {"learning_rate": 0.02},
        },
    }


def test_five_steps_are_those_of_a_pytorch_loop(fields):
    recipe = parse_recipe(fields | {"heads": "kept"})
    inputs = learning_inputs(recipe, Path("/"))
    assert inputs.workspace.models.family.bridged
    results: list[Coefficients] = []
    learn_coefficients(inputs, on_result=results.append)
    assert results[-1].step == STEPS

    base = {
        f"roformer.{name}": value.double()
        for name, value in RoFormerModel.from_pretrained(fields["base"]).state_dict().items()
    }
    experts = [
        AutoModelForSequenceClassification.from_pretrained(task["expert"]).eval().double()
        for task in fields["tasks"].values()
    ]
    coefficients = torch.full((len(base), 2), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=0.02)
    for batch in islice(inputs.calibration.batches(), STEPS):
        clipped = coefficients.clamp(0, 1)
        merged = {}
        for row, (name, value) in zip(clipped, base.items(), strict=True):
            changes = torch.stack([expert.state_dict()[name] - value for expert in experts])
            merged[name] = value + torch.tensordot(row, changes, 1)
        loss = 0.0
        for position, expert in enumerate(experts):
            examples = slice(position * 4, position * 4 + 4)
            given = {n: torch.from_numpy(a[examples]).long() for n, a in batch.inputs.items()}
            heads = {n: p for n, p in expert.named_parameters() if n not in merged}
            logits = functional_call(expert, {**heads, **merged}, kwargs=given).logits
            loss = loss + torch.distributions.Categorical(logits=logits).entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = results[-1].values
    moved = 0
    for name, row in zip(base, coefficients.detach().numpy(), strict=True):
        if name.endswith("key.bias"):
            continue  # it cancels in attention: its gradient is rounding
        np.testing.assert_allclose(np.ravel(learned[name]), row, atol=1e-4, err_msg=name)
        moved += np.abs(row - 0.3).max() > 0.01
    assert moved > 20


def test_a_run_exports_what_transformers_loads(fields, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    tasks = {t: {k: v for k, v in of.items() if k != "test"} for t, of in fields["tasks"].items()}
    recipe = parse_recipe(fields | {"tasks": tasks})
    run = learn(recipe, root=Path("/"), out=tmp_path / "run", console=console)
    assert "PyTorch forward" in console.file.getvalue()
    for task, classes in CLASSES.items():
        folder = run.folder / "checkpoint" / "tasks" / task
        model, report = RoFormerForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.config.num_labels == classes
    # Folding takes no forward: it knows the model by the names of its tensors alone.
    file, again = run.folder / COEFFICIENTS_FILE, tmp_path / "again"
    fold_file(file, recipe, root=Path("/"), out=again, console=console)
    written = sorted((run.folder / "checkpoint").rglob("*.safetensors"))
    assert len(written) > len(CLASSES)
    for weights in written:
        folded = again / "checkpoint" / weights.relative_to(run.folder / "checkpoint")
        assert weights.read_bytes() == folded.read_bytes()


def test_a_bart_that_classifies_texts_is_learned(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    end = tokenizer.sep_token_id
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    config = BartConfig(
        **{"vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 24},
        **{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end, "num_labels": 3},
        **{"decoder_start_token_id": end, "forced_eos_token_id": end, "init_std": 0.5},
        **layers | heads | widths,
    )
    base = randomise(BartForSequenceClassification(config)).model
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tasks = {}
    for seed, task in enumerate(["a", "b"], start=1):
        expert = fine_tune(BartForSequenceClassification(config), base, seed)
        expert.save_pretrained(tmp_path / task)
        rows = [{"text": text, "label": 0} for text in sentences(8, seed)]
        file = str(write_json_lines(tmp_path / f"{task}.jsonl", rows))
        tasks[task] = {"expert": str(tmp_path / task), "calibration": file}
    fields = {"preset": "adamerging", "base": str(tmp_path / "base"), "tasks": tasks}
    fields["learning"] = {"steps": 1, "batch_size": 4, "evaluate_every": 1}
    run = learn(
        parse_recipe(fields), root=Path("/"), out=tmp_path / "run", console=Console(quiet=True)
    )
    for task in tasks:
        checkpoint = run.folder / "checkpoint" / "tasks" / task
        _, report = BartForSequenceClassification.from_pretrained(
            checkpoint, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_llama_that_classifies_texts_is_learned(tmp_path):
    """By its PyTorch forward: the family of Llama here is of language models.

    Its heads have no biases, and their weights are learned.
    """
    tokenizer = bert_tokenizer(tmp_path)
    widths = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(
        **widths,
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 24},
        **{"pad_token_id": tokenizer.pad_token_id, "num_labels": 3, "initializer_range": 0.5},
    )
    base = randomise(LlamaForCausalLM(config))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    fields = {"base": str(tmp_path / "base"), "tasks": {}}
    for seed, task in enumerate(["a", "b"], start=1):
        fine_tune(LlamaForSequenceClassification(config), base.model, seed).save_pretrained(
            tmp_path / task
        )
        rows = [{"text": text, "label": seed} for text in sentences(8, seed)]
        file = str(write_json_lines(tmp_path / f"{task}.jsonl", rows))
        test = {"path": file, "label": "label"}
        fields["tasks"][task] = {
            "expert": str(tmp_path / task),
            "calibration": file,
            "test": test,
        }
    fields["learning"] = {"steps": 1, "batch_size": 4, "evaluate_every": 1}
    run = learn(
        parse_recipe(fields), root=Path("/"), out=tmp_path / "run", console=Console(quiet=True)
    )
    for seed, task in enumerate(fields["tasks"], start=1):
        model = LlamaForSequenceClassification.from_pretrained(
            run.folder / "checkpoint" / "tasks" / task
        )
        inputs = tokenizer(sentences(8, seed), padding=True, return_tensors="pt")
        del inputs["token_type_ids"]
        with torch.inference_mode():
            predicted = model(**inputs).logits.argmax(-1)
        assert run.rows[-1].tasks[task] == (predicted == seed).float().mean()
    learned = Coefficients.load(run.folder / COEFFICIENTS_FILE).head_tensors
    assert {task: [*head] for task, head in learned.items()} == {
        task: ["score.weight"] for task in fields["tasks"]
    }


def test_a_merge_by_the_inputs_of_layers_is_refused(fields, tmp_path, capsys):
    """No layer shows them, so that it would be the average."""
    with pytest.raises(SystemExit) as caught:
        recipe = write_recipe(tmp_path, fields)
        cli.main(["merge", str(recipe), "--method", "regmean", "--out", str(tmp_path / "merged")])
    assert caught.value.code == 2
    assert "no linear layer of this model shows its inputs" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_operation_without_a_counterpart_is_named(monkeypatch, fields):
    environment = torch_in_jax.torch_in_jax()
    for operation in list(environment._ops):
        if "gelu" in str(operation):
            monkeypatch.delitem(environment._ops, operation)
    for operation in list(environment._decomps):
        if "gelu" in str(operation):
            monkeypatch.delitem(environment._decomps, operation)
    config = TEXT_CONFIGS["roformer"](vocab_size=20)
    with pytest.raises(InputError, match=r"gelu.*merges without learning still work"):
        family_of(config, "RoFormerForSequenceClassification")


def test_a_class_that_is_not_learned_is_refused():
    config = TEXT_CONFIGS["roformer"](vocab_size=20)
    with pytest.raises(InputError, match="RoFormerForQuestionAnswering"):
        family_of(config, "RoFormerForQuestionAnswering")


def test_torchax_that_is_missing_is_named(monkeypatch):
    torch_in_jax.torch_in_jax.cache_clear()
    monkeypatch.setattr(torch_in_jax.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'adamerge_jax\[torch\]'"):
        torch_in_jax.torch_in_jax()


def test_images_of_a_model_without_a_size_are_its_processors(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    family = family_of(checkpoint.config, "ResNetForImageClassification")
    assert _image_shape(family, checkpoint) == (3, 16, 24)
