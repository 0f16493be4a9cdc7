"""Merging and folding of models whose architecture has no family here."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import merge_by_task_arithmetic, require_sum, write_recipe


def mixture() -> PreTrainedModel:
    """Returns a mixture of experts, numbered like the layers, with a parameter of one value."""
    sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    model = PhimoeForCausalLM(PhimoeConfig(**sizes, **heads, num_local_experts=2))
    model.model.temperature = torch.nn.Parameter(torch.tensor(1.5))
    return model


def masked_language_model() -> PreTrainedModel:
    """Returns a model whose type has a family here that does not know its head."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2))


def convolutions() -> PreTrainedModel:
    """Returns a ResNet, whose normalisations count batches in whole numbers."""
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


def save(model: PreTrainedModel, folder: Path, seed: int | None = None) -> dict[str, Any]:
    """Saves a model, changed by a seed, and returns the tensors of its file."""
    model = copy.deepcopy(model)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def merge(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """Merges `base` with `cat` and `dog` by task arithmetic and returns the merged tensors."""
    tasks = {task: {"expert": str(folder / task)} for task in ("cat", "dog")}
    recipe = {"base": str(folder / "base"), "tasks": tasks, "export": {"orbax": False}}
    file, out = write_recipe(folder, recipe), folder / "out"
    merged = load_file(merge_by_task_arithmetic(file, out, *options) / "model.safetensors")
    again = folder / "again"
    cli.main(["fold", str(file), str(out / "coefficients.safetensors"), "--out", str(again)])
    for name, tensor in load_file(again / "checkpoint" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name])
    return merged


@pytest.mark.parametrize("make", [mixture, masked_language_model, convolutions])
def test_every_tensor_is_merged_or_as_in_the_base(make, tmp_path, capsys):
    model = make()
    base = save(model, tmp_path / "base")
    cat, dog = (save(model, tmp_path / task, seed) for seed, task in enumerate(("cat", "dog")))
    merged = merge(tmp_path)
    heads = {name for name in base if make is convolutions and name.startswith("classifier")}
    assert merged.keys() == base.keys() - heads
    floating = [name for name in merged if merged[name].is_floating_point()]
    for name in merged:
        if name in floating:
            experts = [cat[name], dog[name]]
            require_sum(merged[name], base[name], experts, rtol=0, atol=1e-6, name=name)
        else:
            assert torch.equal(merged[name], base[name])
    assert f"{len(floating)} of {len(base)} tensors merged" in capsys.readouterr().out
    loaded = type(model).from_pretrained(tmp_path / "out" / "checkpoint").state_dict()
    for name in floating:
        if name in loaded:
            assert torch.equal(loaded[name], merged[name])


def test_each_task_keeps_its_head(tmp_path, capsys):
    sizes = dict(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=32)
    backbone = DistilBertModel(DistilBertConfig(**sizes))
    base = save(backbone, tmp_path / "base")
    experts = []
    for classes, task in ((2, "cat"), (3, "dog")):
        config = DistilBertConfig(**sizes, num_labels=classes)
        model = DistilBertForSequenceClassification(config)
        model.distilbert.load_state_dict(backbone.state_dict())
        experts.append(save(model, tmp_path / task, classes))
    merged = merge(tmp_path)
    assert merged.keys() == {f"distilbert.{name}" for name in base}
    for name, tensor in merged.items():
        start = base[name.removeprefix("distilbert.")]
        require_sum(tensor, start, [e[name] for e in experts], rtol=0, atol=1e-6, name=name)
    for expert, task in zip(experts, ("cat", "dog"), strict=True):
        folder = tmp_path / "out" / "checkpoint" / "tasks" / task
        loaded = DistilBertForSequenceClassification.from_pretrained(folder).state_dict()
        for name in ("pre_classifier.weight", "classifier.weight", "classifier.bias"):
            assert torch.equal(loaded[name], expert[name])
        assert torch.equal(
            loaded["distilbert.embeddings.word_embeddings.weight"],
            merged["distilbert.embeddings.word_embeddings.weight"],
        )


def test_what_an_expert_lacks_is_as_in_the_base_and_said(tmp_path, capsys):
    model = mixture()
    base = save(model, tmp_path / "base")
    for seed, task in enumerate(("cat", "dog")):
        save(model, tmp_path / task, seed)
    file = tmp_path / "cat" / "model.safetensors"
    tensors = load_file(file)
    lacking = "model.layers.1.block_sparse_moe.gate.weight"
    del tensors[lacking]
    save_file(tensors, file, metadata={"format": "pt"})
    merged = merge(tmp_path)
    assert torch.equal(merged[lacking], base[lacking])
    line = f"as in the base, expert 'cat' lacks them: 1 ({lacking})"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "out" / "checkpoint" / "README.md").read_text()


def test_an_expert_that_lacks_half_is_refused(tmp_path, caplog):
    base = save(masked_language_model(), tmp_path / "base")
    for seed, task in enumerate(("cat", "dog")):
        save(masked_language_model(), tmp_path / task, seed)
    file = tmp_path / "cat" / "model.safetensors"
    tensors = load_file(file)
    few = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    save_file(few, file, metadata={"format": "pt"})
    tasks = {task: {"expert": str(tmp_path / task)} for task in ("cat", "dog")}
    recipe = {"base": str(tmp_path / "base"), "tasks": tasks}
    open_models(parse_recipe(recipe), tmp_path, to_run=False)
    lacking = len(tensors) - len(few)
    assert f"expert 'cat' ({tmp_path / 'cat'}) lacks {lacking} of {len(base)} para" in caplog.text
    fewer = {name: tensor for name, tensor in few.items() if "encoder" not in name}
    save_file(fewer, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"of the values: .*; save the whole model, or list in keep"
    ):
        open_models(parse_recipe(recipe), tmp_path, to_run=False)
    recipe["keep_from_base"] = ["*encoder*"]
    caplog.clear()
    open_models(parse_recipe(recipe), tmp_path, to_run=False)
    assert "lacks" not in caplog.text


def test_names_of_another_version(tmp_path):
    """An expert with the names of modules, the base and another one with those of files."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(model_type="llama", vocab_size=32, num_key_value_heads=2)
    config = LlavaConfig(text_config=text, vision_config=sizes | dict(image_size=8, patch_size=4))
    model = LlavaForConditionalGeneration(config)
    base = save(model, tmp_path / "base")
    cat, dog = (save(model, tmp_path / task, seed) for seed, task in enumerate(("cat", "dog")))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "dog")
    again.save_pretrained(tmp_path / "dog", save_original_format=False)
    assert load_file(tmp_path / "dog" / "model.safetensors").keys().isdisjoint(base)
    merged = merge(tmp_path)
    assert merged.keys() == base.keys()
    for name in base:
        experts = [cat[name], dog[name]]
        require_sum(merged[name], base[name], experts, rtol=0, atol=1e-6, name=name)


def test_a_tensor_that_the_base_lacks_is_refused(tmp_path, capsys):
    model = mixture()
    save(model, tmp_path / "base")
    for seed, task in enumerate(("cat", "dog")):
        save(model, tmp_path / task, seed)
    file = tmp_path / "dog" / "model.safetensors"
    more = load_file(file) | {"model.layers.0.adapter.weight": torch.ones(2, 2)}
    save_file(more, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as caught:
        merge(tmp_path)
    assert caught.value.code == 2
    assert "expert 'dog'" in (error := capsys.readouterr().err)
    assert "has model.layers.0.adapter.weight" in error
    assert not (tmp_path / "out").exists()


def test_learning_without_data_is_refused(tmp_path, capsys):
    model = mixture()
    for task in ("base", "cat", "dog"):
        save(model, tmp_path / task, None if task == "base" else len(task))
    tasks = {task: {"expert": str(tmp_path / task)} for task in ("cat", "dog")}
    file = write_recipe(tmp_path, {"base": str(tmp_path / "base"), "tasks": tasks})
    with pytest.raises(SystemExit) as caught:
        cli.main(["learn", str(file), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "field tasks.cat.calibration is missing" in capsys.readouterr().err
