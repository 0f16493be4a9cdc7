"""Adapters of classifiers of architectures without a family here, and of ModernBERT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DebertaConfig,
    DebertaModel,
    GPT2Config,
    GPT2LMHeadModel,
    IJepaConfig,
    IJepaModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
)

from adamerge_jax.cli import main as cli
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import (
    SPECIAL_TOKENS,
    bert_tokenizer,
    random_coefficients,
    randomise,
    sentences,
    write_json_lines,
    write_recipe,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = SIZES | {"vocab_size": 31}
CLASSES = 3

GPT2 = GPT2Config(
    n_embd=16, n_layer=1, n_head=2, vocab_size=31, **dict.fromkeys(SPECIAL_TOKENS[:3], 0)
)


class Kind(NamedTuple):
    """A base, the class of its experts, and their adapters."""

    base: Callable[[], PreTrainedModel]
    auto_class: type
    lora: dict[str, Any]


KINDS = {
    # Its config names no token that pads: that of the tokenizer counts.
    "llama": Kind(
        lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
        AutoModelForSequenceClassification,
        dict(target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
    ),
    # The weights of its layers are transposed.
    "gpt2": Kind(
        lambda: GPT2LMHeadModel(GPT2),
        AutoModelForSequenceClassification,
        dict(target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", fan_in_fan_out=True),
    ),
    "gpt2 dora": Kind(
        lambda: GPT2LMHeadModel(GPT2),
        AutoModelForSequenceClassification,
        dict(
            target_modules=["c_attn", "c_fc"],
            task_type="SEQ_CLS",
            fan_in_fan_out=True,
            use_dora=True,
        ),
    ),
    # The layer below the classifier is the base's own. By a family here: no other model has that.
    "modernbert": Kind(
        lambda: ModernBertForMaskedLM(
            ModernBertConfig(**TEXT, **dict.fromkeys(SPECIAL_TOKENS, 0), local_attention=8)
        ),
        AutoModelForTokenClassification,
        dict(target_modules=["Wqkv", "Wi"], task_type="TOKEN_CLS"),
    ),
    # Saved without the prefix that the adapter's names have; with a head of two layers.
    "deberta": Kind(
        lambda: DebertaModel(DebertaConfig(**TEXT, pooler_hidden_size=16)),
        AutoModelForSequenceClassification,
        dict(
            target_modules=["in_proj"],
            task_type="SEQ_CLS",
            modules_to_save=["pooler", "classifier"],
        ),
    ),
    # PEFT has no type of tasks for images.
    "ijepa": Kind(
        lambda: IJepaModel(IJepaConfig(**SIZES, image_size=32)),
        AutoModelForImageClassification,
        dict(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    ),
}


def save_adapter(base: Path, folder: Path, kind: Kind, seed: int) -> PreTrainedModel:
    """Saves an adapter with changes to all that it trains.

    Returns:
        The model that PEFT makes of it.
    """
    torch.manual_seed(seed)
    model = kind.auto_class.from_pretrained(base, num_labels=CLASSES)
    model.config.pad_token_id = 0
    adapted: PeftModel = get_peft_model(model, LoraConfig(r=2, **kind.lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> tuple[dict[str, Any], dict[str, PreTrainedModel]]:
    """The fields of a recipe without data, and PEFT's models by task."""
    root, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    randomise(kind.base()).save_pretrained(root / "base")
    bert_tokenizer(root).save_pretrained(root / "base")
    models = {
        task: save_adapter(root / "base", root / task, kind, seed)
        for seed, task in enumerate(("a", "b"), start=1)
    }
    tasks = {task: {"expert": str(root / task)} for task in models}
    return {"base": str(root / "base"), "tasks": tasks}, models


def test_parameters_are_those_that_peft_makes(saved, tmp_path):
    fields, merged = saved
    for task in merged:
        fields["tasks"][task]["calibration"] = "none"
    models = open_models(parse_recipe(fields), Path("/"))
    assert models.family.bridged == (models.base.checkpoint.config.model_type != "modernbert")
    for task, model in merged.items():
        model.save_pretrained(tmp_path / task)
        expected = load_file(tmp_path / task / "model.safetensors")
        network = models.build_head(task)
        head = {*models.head_names(task)}
        assert head >= {*network.shapes} and not head & models.base.names.keys()
        assert models.experts[task].checkpoint.config.num_labels == CLASSES
        for name in (*models.base.names, *head):
            np.testing.assert_allclose(
                models.experts[task].read(name), expected[name], atol=1e-6, err_msg=name
            )


def test_a_merge_without_learning_exports_them(saved, tmp_path):
    """With one adapter left, whose coefficient is 1, the merge is its model."""
    fields, merged = saved
    tasks = {"a": {"expert": fields["tasks"]["a"]["expert"]}}
    recipe = write_recipe(tmp_path, {"base": fields["base"], "tasks": tasks})
    method = ["--method", "task_arithmetic", "--options", "{coefficient: 1}"]
    cli.main(["merge", str(recipe), *method, "--out", str(tmp_path / "out")])
    model, info = type(merged["a"]).from_pretrained(
        tmp_path / "out" / "checkpoint" / "tasks" / "a", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = merged["a"].state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], atol=1e-6, err_msg=name)


def test_a_merge_of_transposed_layers_is_an_adapter(tmp_path):
    kind = Kind(
        lambda: GPT2LMHeadModel(GPT2),
        AutoModelForCausalLM,
        dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    randomise(kind.base()).save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("a", "b")):
        save_adapter(tmp_path / "base", tmp_path / task, kind, seed)
    tasks = {task: {"expert": task} for task in ("a", "b")}
    fields = {"base": "base", "tasks": tasks, "export": {"adapter": True}}
    models = open_models(parse_recipe(fields), tmp_path, to_run=False)
    random_coefficients(models, "row").save(tmp_path / "c.safetensors")
    recipe, out = write_recipe(tmp_path, fields), tmp_path / "out"
    cli.main(["fold", str(recipe), str(tmp_path / "c.safetensors"), "--out", str(out)])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    by_adapter = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out / "checkpoint").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, by_adapter[name], rtol=0, atol=1e-5)
        is_changed = name.endswith(("c_attn.weight", "c_fc.weight"))
        assert is_changed == (tensor - before[name]).abs().max().gt(1e-3).item()


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_a_run_gives_experts_the_scores_of_peft(saved, tmp_path):
    """And folding repeats its merge and heads."""
    fields, merged = saved
    tokenizer = bert_tokenizer(tmp_path)
    expected = {}
    for seed, (task, model) in enumerate(merged.items()):
        texts = sentences(12, seed)
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        del inputs["token_type_ids"]
        with torch.inference_mode():
            labels = model(**inputs).logits.argmax(-1).tolist()
        labels[0] = (labels[0] + 1) % CLASSES
        rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
        file = str(write_json_lines(tmp_path / f"{task}.jsonl", rows))
        fields["tasks"][task] |= {"calibration": file, "test": {"path": file, "label": "label"}}
        expected[task] = 11 / 12
    run = learn(
        parse_recipe(fields | {"learning": {"steps": 1, "batch_size": 4}}),
        root=Path("/"),
        out=tmp_path / "run",
        console=Console(quiet=True),
    )
    experts = next(row for row in run.rows if row.kind == "experts")
    assert experts.tasks == pytest.approx(expected)
    exported = AutoModelForSequenceClassification.from_pretrained(
        run.folder / "checkpoint" / "tasks" / "a"
    )
    assert exported.config.pad_token_id == tokenizer.pad_token_id
    recipe, again = run.folder / "recipe.yaml", tmp_path / "again"
    cli.main(["fold", str(recipe), str(run.folder), "--out", str(again)])
    files = sorted((again / "checkpoint").rglob("*.safetensors"))
    assert len(files) == 1 + 2 * len(merged)  # of each task the backbone and its head
    for file in files:
        assert file.read_bytes() == (run.folder / file.relative_to(again)).read_bytes()
