"""Learning of vision-language models from conversations with images, against PyTorch."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.data.answers import find_answers
from adamerge_jax.data.conversations import Tokens
from adamerge_jax.errors import InputError
from adamerge_jax.mixing import is_lazy
from adamerge_jax.models.images_in_text import COUNT, PIXELS
from adamerge_jax.objectives import NOT_PREDICTED, TargetSpec
from adamerge_jax.pipeline.learn import _require_layers
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_backbone, load_expert
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import rows_of
from tests.vision_language_references import TASKS, save_vision_language

SIZE = (16, 24)
PIECES = (16 // 4) * (24 // 4) // 2**2
"""Tokens of an image: patches of 4 x 4 pixels, merged by 2 x 2."""


class Tiny(NamedTuple):
    """A Qwen2-VL with two experts, opened, and a finished run."""

    fields: dict[str, Any]
    workspace: Workspace
    run: Path
    printed: str


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("vision_language")
    fields = save_vision_language(root) | {
        "objectives": [{"name": "logit_alignment"}],
        "coefficients": {"granularity": "tensor", "initial": 0.3},
        "keep_from_base": ["visual.merger.*"],
        "learning": {
            "steps": 2,
            "batch_size": 2,
            "evaluate_every": 2,
            "optimizer": {"learning_rate": 0.05},
        },
    }
    recipe = parse_recipe(fields)
    console = Console(file=io.StringIO(), width=200)
    run = learn(recipe, root=Path("/"), out=root / "run", console=console)
    workspace = open_workspace(recipe, Path("/"))
    return Tiny(fields, workspace, run.folder, console.file.getvalue())


def reference(folder: Path, row: dict[str, Any], root: Path, *, answered: bool) -> dict[str, Any]:
    """The inputs of a conversation, made without the package."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = row["messages"][: None if answered else 1]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not answered
    )
    text = text.replace("<|image_pad|>", "<|image_pad|>" * PIECES)
    inputs = dict(tokenizer([text], return_tensors="pt", add_special_tokens=False))
    inputs.pop("token_type_ids", None)
    names = [part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"]
    if names:
        images = [Image.open(root / name).resize(SIZE[::-1], Image.BICUBIC) for name in names]
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        inputs |= dict(processor(images, return_tensors="pt"))
        token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
    return inputs


def test_tokens_and_images_are_those_of_transformers(tiny):
    task, folder = TASKS[0], Path(tiny.fields["base"])
    file = Path(tiny.fields["tasks"][task]["test"])
    examples = tiny.workspace.data.test[task]
    index = np.arange(len(examples))
    inputs = examples.take(index, 64)
    labels = examples.take_labels(index, 64)
    assert inputs[COUNT].tolist() == [1, 1, 1, 2, 0, 1, 1, 2]
    assert inputs[PIXELS].shape[1:] == (2, 1, 4, 6, 96)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for place, row in enumerate(rows_of(file)):
        given = reference(folder, row, file.parent, answered=True)
        count = given["input_ids"].shape[1]
        np.testing.assert_array_equal(inputs["input_ids"][place, :count], given["input_ids"][0])
        assert inputs["attention_mask"][place].sum() == count
        images = inputs[PIXELS][place, : inputs[COUNT][place]].reshape(-1, 96)
        if len(images):
            np.testing.assert_array_equal(images, given["pixel_values"])
        answer = labels[place][labels[place] != NOT_PREDICTED]
        assert tokenizer.decode(answer) == row["messages"][1]["content"][0]["text"]


@pytest.mark.parametrize(
    ("method", "folders"),
    [("learned (tensor)", ["run/checkpoint"] * 2), ("experts (one model each)", TASKS)],
)
def test_losses_are_pytorchs(tiny, method, folders):
    """The losses of a merge and of the experts, which logits that are off by 1e-4 would move."""
    root = Path(tiny.fields["base"]).parent
    results = json.loads((tiny.run / "results.json").read_text())
    (row,) = [row for row in results["rows"] if row["method"] == method]
    for task, folder in zip(TASKS, folders, strict=True):
        model = Qwen2VLForConditionalGeneration.from_pretrained(root / folder).eval()
        losses = []
        for conversation in rows_of(tiny.fields["tasks"][task]["test"]):
            given = reference(Path(tiny.fields["base"]), conversation, root, answered=True)
            asked = reference(Path(tiny.fields["base"]), conversation, root, answered=False)
            answer = slice(asked["input_ids"].shape[1], given["input_ids"].shape[1] - 2)
            with torch.no_grad():
                logits = model(**given).logits[0]
            predicted = logits[answer.start - 1 : answer.stop - 1]
            losses += torch.nn.functional.cross_entropy(
                predicted, given["input_ids"][0, answer], reduction="none"
            ).tolist()
        assert row["tasks"][task] == pytest.approx(np.mean(losses), abs=1e-5)


def test_hidden_states_are_those_of_the_text(tiny):
    _require_layers({"a": TargetSpec(hidden_states=(-2, 1))}, tiny.workspace.models)
    with pytest.raises(InputError, match=r"layer 2 are asked for; the model has layers 0 .* to 1"):
        _require_layers({"a": TargetSpec(hidden_states=(2,))}, tiny.workspace.models)


def test_vision_is_merged_too_but_for_what_is_kept(tiny):
    coefficients = Coefficients.load(tiny.run / "coefficients.safetensors")
    vision = [name for name in coefficients.values if name.startswith("visual.")]
    assert len(vision) > 8 and not any("merger" in name for name in vision)
    moved = [np.abs(np.asarray(coefficients.values[name]) - 0.3).max() for name in vision]
    assert np.median(moved) > 0.01
    base = load_file(Path(tiny.fields["base"]) / "model.safetensors")
    merged = load_file(tiny.run / "checkpoint" / "model.safetensors")
    assert merged.keys() == base.keys()
    unchanged = {name for name in base if np.array_equal(base[name], merged[name])}
    assert unchanged == {name for name in base if name.startswith("visual.merger.")}


def test_transformers_generates_from_the_export(tiny):
    checkpoint = tiny.run / "checkpoint"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    file = Path(tiny.fields["tasks"][TASKS[0]]["test"])
    given = reference(checkpoint, rows_of(file)[3], file.parent, answered=False)
    written = model.generate(**given, max_new_tokens=4, do_sample=False)
    count = given["input_ids"].shape[1]
    assert written.shape[1] > count
    card = (checkpoint / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoProcessor" in card


def test_answers_with_images_are_those_that_transformers_writes(tiny):
    task, folder = TASKS[0], Path(tiny.fields["base"])
    examples = tiny.workspace.data.test[task]
    answers, evaluator = examples.answers, tiny.workspace.evaluator
    assert answers.examples.tolist() == list(range(8)) and evaluator.is_asked(examples)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder.parent / task).eval()
    model.generation_config.eos_token_id = list(answers.stops)
    root, written = folder.parent, []
    for row in rows_of(tiny.fields["tasks"][task]["test"]):
        given = reference(folder, row, root, answered=False)
        count = given["input_ids"].shape[1]
        tokens = model.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0)
        tokens = tokens[0, count:].tolist()
        stop = next((at for at, token in enumerate(tokens) if token in answers.stops), None)
        written.append(tokens[:stop])
    assert len({tuple(tokens) for tokens in written}) > 1
    expert = tiny.workspace.expert(task, tiny.workspace.base())
    chosen = np.array([3, 4, 0, 6])
    part = answers.subset(chosen)
    writer = evaluator._answering.writer
    for of_whole, places in ((answers, range(8)), (part, chosen)):
        found = writer.continuations(
            expert, of_whole.prompts, of_whole.stops, 5, beside=of_whole.beside
        )
        assert found == [written[at] for at in places]


def test_an_answer_before_an_image_is_left_out(tiny):
    sequence = Tokens([1, 9, 2, 3, 4, 9], [False, False, True, True, False, False])
    tokenizer = AutoTokenizer.from_pretrained(tiny.fields["base"])
    assert find_answers([sequence], tokenizer, 8, has_end=True, image=9) is None
    assert len(find_answers([sequence], tokenizer, 8, has_end=True)) == 1


@pytest.mark.parametrize(
    ("layers", "vision"),
    [("model.language_model.layers", "model.visual"), ("model.layers", "visual")],
    ids=["of today", "of older versions"],
)
def test_adapters_have_names_of_modules(tiny, tmp_path, layers, vision):
    """Adapters name the modules that they were trained on, which files of the base do not have."""
    generator = np.random.default_rng(0)
    factors = {}
    for module, (rows, columns) in {
        f"{layers}.0.self_attn.q_proj": (32, 32),
        f"{vision}.blocks.0.attn.qkv": (96, 32),
    }.items():
        for factor, shape in {"lora_A": (2, columns), "lora_B": (rows, 2)}.items():
            name = f"base_model.model.{module}.{factor}.weight"
            factors[name] = generator.normal(size=shape).astype(np.float32)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    task = TASKS[0]
    tasks = tiny.fields["tasks"] | {task: {"expert": str(tmp_path)}}
    recipe = parse_recipe(tiny.fields | {"tasks": tasks, "keep_from_base": []})
    models = open_models(recipe, Path("/"), to_run=False)
    changed = {"model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"}
    base = load_file(Path(tiny.fields["base"]) / "model.safetensors")
    parameters = load_backbone(models, models.base, None)
    expert = load_expert(models, task, parameters, None)
    for parameter in models.shapes:
        for place, name in enumerate(models.tensors(parameter)):
            value = expert[parameter]
            if "*" in parameter:  # stacked layers
                value = jax.tree.map(lambda leaf, place=place: leaf[place], value)
            value = value.materialize() if is_lazy(value) else value
            expected = base[name]
            if name in changed:
                module = name.removesuffix(".weight").replace("model.layers", layers)
                module = module.replace("visual", vision)
                a, b = (
                    factors[f"base_model.model.{module}.{factor}.weight"]
                    for factor in ("lora_A", "lora_B")
                )
                expected = expected + b @ a
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)
