"""Merges of LoRA adapters: learned as those of whole models are, and written as one adapter."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from rich.console import Console
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.peft_config import WEIGHTS_FILE
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.pipeline import run as jobs
from adamerge_jax.pipeline.export import export
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.registry import allow_code
from tests.adapter_references import PLAIN, letter_tokenizer, save_experts
from tests.references import (
    bert_tokenizer,
    random_coefficients,
    sentences,
    write_json_lines,
    write_recipe,
)

Fields = dict[str, Any]

LEARNING = dict(
    steps=4,
    batch_size=4,
    # Rounding decides on the sign of a gradient that is almost 0, and Adam would make whole steps
    # of it; a large eps leaves it as small as it is.
    optimizer=dict(name="adam", learning_rate=0.01, options=dict(eps=1e-3)),
)


class Saved(NamedTuple):
    """The fields of one recipe with adapters, and with the models that PEFT makes of them."""

    adapters: Fields
    whole: Fields


def saved(kind: str, root: Path, adapters: Any = PLAIN) -> Saved:
    return Saved(*save_experts(kind, root, adapters))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Saved:
    """Three adapters of a LLaMA, with texts to learn from."""
    root = tmp_path_factory.mktemp("llama")
    fields = saved("llama", root)
    letter_tokenizer().save_pretrained(root / "base")
    return with_data(fields, root)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Saved:
    """Three adapters of a BERT with a classifier each, with texts to learn from."""
    root = tmp_path_factory.mktemp("bert")
    fields = saved("bert", root)
    bert_tokenizer(root).save_pretrained(root / "base")
    return with_data(fields, root)


def with_data(fields: Saved, root: Path) -> Saved:
    for form in fields:
        form |= {"preset": "adamerging", "learning": LEARNING}
        for seed, (task, own) in enumerate(form["tasks"].items()):
            rows = [{"text": text} for text in sentences(20, seed)]
            own["calibration"] = str(write_json_lines(root / f"{task}.jsonl", rows))
    return fields


def quiet() -> Console:
    return Console(quiet=True)


def learned(fields: Fields, out: Path) -> Coefficients:
    recipe = parse_recipe(fields)
    return jobs.learn(recipe, root=Path("/"), out=out, console=quiet()).coefficients


@pytest.mark.parametrize(("kind", "objective"), [("llama", "logit_alignment"), ("bert", "entropy")])
def test_adapters_learn_what_whole_models_learn(kind, objective, request, tmp_path):
    found, expected = (
        learned(
            form
            | {"objectives": [{"name": objective}]}
            | {"export": {"adapter": form is not whole, "orbax": form is not whole}},
            tmp_path / str(form is whole),
        )
        for whole in [request.getfixturevalue(kind).whole]
        for form in (request.getfixturevalue(kind).adapters, whole)
    )
    assert found.parameters == expected.parameters
    assert found.step == expected.step > 0
    moved = 0.0
    for name, values in expected.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=0, atol=1e-5, err_msg=name)
        moved = max(moved, abs(values - 0.3).max())
    assert moved > 1e-3
    # The run wrote one adapter too, which makes the checkpoint of the base.
    folder = tmp_path / "False"
    assert {file.name for file in folder.iterdir()} >= {"checkpoint", "orbax", "adapter"}
    assert not (tmp_path / "True" / "adapter").exists()
    require_same(kind, Path(request.getfixturevalue(kind).adapters["base"]), folder)


def default_granularity(fields: Fields) -> str:
    recipe = parse_recipe(fields | {"preset": "recommended"})
    return build(recipe, open_models(recipe, Path("/"))).result.granularity.name


def test_adapters_of_a_language_model_have_coefficients_for_columns_too(llama, bert):
    assert default_granularity(llama.adapters) == "row_column"
    assert default_granularity(llama.whole) == "row"
    assert default_granularity(bert.adapters) == "row"
    mixed = dict(llama.adapters["tasks"], two=llama.whole["tasks"]["two"])
    assert default_granularity(llama.adapters | {"tasks": mixed}) == "row"


def loaded(kind: str, base: Path) -> PreTrainedModel:
    """The base as PEFT's users load it for an adapter."""
    loader = {
        "llama": AutoModelForCausalLM,
        "tied": AutoModelForCausalLM,
        "t5": AutoModelForSeq2SeqLM,
    }
    return loader.get(kind, AutoModel).from_pretrained(base).eval()


def require_same(kind: str, base: Path, out: Path, changed: int | None = None) -> None:
    """PEFT merges the adapter into the base to what the checkpoint holds."""
    model = PeftModel.from_pretrained(loaded(kind, base), out / "adapter")
    # Saved, because transformers has other names for a ViT in memory than in files.
    model.merge_and_unload().save_pretrained(out / "merged")
    merged = load_file(out / "merged" / "model.safetensors")
    checkpoint = Checkpoint.open(out / "checkpoint")
    before = load_file(base / "model.safetensors")
    prefix = f"{kind}." if kind in ("bert", "vit", "dinov2") else ""
    found = 0
    for name in checkpoint.tensors:
        bare = name.removeprefix(prefix)
        folded = checkpoint.read(name)
        np.testing.assert_allclose(merged[bare], folded, rtol=1e-6, atol=1e-6, err_msg=name)
        found += bool((folded != before[bare]).any())
    assert found > 3 if changed is None else found == changed


def folded(
    fields: Fields, out: Path, coefficients: Coefficients | None = None, **options
) -> Models:
    """Exports random coefficients as a checkpoint and as an adapter."""
    recipe = parse_recipe(fields | {"export": {"adapter": True}})
    opened = open_models(recipe, Path("/"))
    own = coefficients or random_coefficients(opened, **options)
    export(export_job(opened, own, recipe.export, Path("/"), []), out, quiet())
    return opened


GRANULARITIES: dict[str, Fields] = {
    "task": {},
    "layer": {},
    "tensor": {},
    "groups": {"patterns": {"first": ["*.layers.0.*"]}},
    "row": {},
    "column": {},
    "head": {"heads": {"*.q_proj.weight": (0, 2), "*.o_proj.weight": (1, 2)}},
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_adapter_of_every_granularity(llama, tmp_path, granularity):
    folded(llama.adapters, tmp_path, granularity=granularity, **GRANULARITIES[granularity])
    require_same("llama", Path(llama.adapters["base"]), tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == llama.adapters["base"]
    # Of `two` there is only a query, of rank 3; of `three`, rank 1 in the last layer.
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    ranks = {
        module: tensors[f"base_model.model.model.layers.{module}.lora_A.weight"].shape[0]
        for module in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj")
    }
    assert list(ranks.values()) == [7, 6, 4]


def test_an_adapter_of_a_granularity_of_ones_own(llama, tmp_path):
    """It tells nothing of itself, and exports the adapter of the built-in one that is the same."""
    tensors = {}
    allow_code(["tests.own_granularity:rows"])
    for granularity in ("row", "tests.own_granularity:rows"):
        out = tmp_path / granularity.rpartition(":")[2]
        folded(llama.adapters, out, granularity=granularity)
        require_same("llama", Path(llama.adapters["base"]), out)
        tensors[granularity] = load_file(out / "adapter" / WEIGHTS_FILE)
    expected, found = tensors.values()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_an_adapter_of_rows_and_columns_has_twice_the_rank(llama, tmp_path):
    folded(llama.adapters, tmp_path, granularity="row_column")
    require_same("llama", Path(llama.adapters["base"]), tmp_path)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    a = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.shape[0] == 14


@pytest.mark.parametrize("kind", ["bert", "vit", "dinov2", "clip", "t5", "tied"])
def test_an_adapter_of_every_kind_of_model(tmp_path, kind):
    adapters = {
        "one": dict(r=2, target_modules=r".*(q|query|q_proj|fc1|wo|up_proj|dense)"),
        "two": dict(r=3, lora_alpha=4, target_modules=r".*(v|q|query|q_proj|down_proj)"),
    }
    if kind in ("bert", "clip"):
        table = "word_embeddings" if kind == "bert" else "position_embedding"
        adapters["three"] = dict(r=1, target_modules=["value", "v_proj", table])
    if kind == "dinov2":  # its files hold this layer and the gate in one tensor
        adapters["one"]["exclude_modules"] = ["up_proj"]
    fields = saved(kind, tmp_path, adapters).adapters
    folded(fields, tmp_path / "out", granularity="row")
    require_same(kind, Path(fields["base"]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    expected = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM", "tied": "CAUSAL_LM"}
    assert config["task_type"] == expected.get(kind)


def test_the_adapter_computes_what_the_checkpoint_computes(llama, bert, tmp_path):
    ids = torch.arange(24).reshape(2, 12) % 40
    folded(llama.adapters, tmp_path / "llama", granularity="row")
    adapted = PeftModel.from_pretrained(
        loaded("llama", Path(llama.adapters["base"])), tmp_path / "llama" / "adapter"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "checkpoint").eval()
    # transformers finds the base by itself.
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "adapter").eval()
    with torch.no_grad():
        logits = merged(ids).logits.numpy()
        np.testing.assert_allclose(adapted(ids).logits.numpy(), logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found(ids).logits.numpy(), logits, rtol=1e-4, atol=1e-5)

    folded(bert.adapters, tmp_path / "bert", granularity="column")
    backbone = AutoPeftModelForFeatureExtraction.from_pretrained(
        tmp_path / "bert" / "adapter"
    ).eval()
    merged = AutoModel.from_pretrained(tmp_path / "bert" / "checkpoint").eval()
    with torch.no_grad():
        states = [model(ids).last_hidden_state.numpy() for model in (backbone, merged)]
    np.testing.assert_allclose(*states, rtol=1e-4, atol=1e-5)


def test_what_is_kept_from_the_base_is_not_in_the_adapter(llama, tmp_path):
    fields = llama.adapters | {"keep_from_base": ["*.layers.1.*", "*.mlp.*"]}
    folded(fields, tmp_path)
    names = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert len(names) == 2 * 4
    assert all(".layers.0.self_attn." in name for name in names)


def test_what_a_fold_keeps_from_the_base_is_not_in_the_adapter(llama, tmp_path):
    models = open_models(parse_recipe(llama.adapters), Path("/"))
    random_coefficients(models, "row").save(tmp_path / "rows.safetensors")
    fields = llama.adapters | {"keep_from_base": ["*.q_proj.*"], "export": {"adapter": True}}
    out = tmp_path / "out"
    jobs.fold_file(
        tmp_path / "rows.safetensors",
        parse_recipe(fields),
        root=Path("/"),
        out=out,
        console=quiet(),
    )
    require_same("llama", Path(llama.adapters["base"]), out)
    assert not any("q_proj" in name for name in load_file(out / "adapter" / WEIGHTS_FILE))


def refusal(fields: Fields, out: Path, **changes: Any) -> str:
    """Why learning is refused before anything is learned or written."""
    with pytest.raises(InputError) as caught:
        learned(fields | {"export": {"adapter": True}} | changes, out)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("export.adapter: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("granularity", "options"),
    [("chunk", {"pieces": 4}), ("partition", {"groups": 4}), ("singular", {"rank": 2})],
)
def test_granularities_that_no_adapter_has(llama, tmp_path, granularity, options):
    chosen = {"granularity": granularity, "granularity_options": options}
    said = refusal(llama.adapters, tmp_path / "out", coefficients=chosen)
    assert f"granularity {granularity!r}" in said
    assert "tensor" in said


def test_interference_that_no_adapter_has(llama, tmp_path):
    said = refusal(llama.adapters, tmp_path / "out", interference=[{"name": "elect_sign"}])
    assert "interference" in said


def test_experts_that_no_adapter_has(llama, tmp_path):
    tasks = llama.adapters["tasks"] | {"two": llama.whole["tasks"]["two"]}
    said = refusal(llama.adapters, tmp_path / "out", tasks=tasks)
    assert "expert 'two' is a whole model" in said


def test_tensors_that_are_saved_whole(llama, tmp_path):
    shutil.copytree(llama.adapters["base"], tmp_path / "base")
    options = {
        "four": dict(r=2, target_modules=["q_proj"], modules_to_save=["model.norm", "lm_head"])
    }
    four = saved("llama", tmp_path, options).adapters["tasks"]["four"]
    four["calibration"] = llama.adapters["tasks"]["one"]["calibration"]
    tasks = llama.adapters["tasks"] | {"four": four}
    said = refusal(llama.adapters, tmp_path / "out", tasks=tasks)
    assert "expert 'four' saved " in said
    assert "modules_to_save" in said
    # What is not merged may be saved whole, and so may what is as it was.
    fields = llama.adapters | {"tasks": tasks, "keep_from_base": ["lm_head.weight"]}
    file = tmp_path / "adapters" / "four" / WEIGHTS_FILE
    tensors = load_file(file)
    before = load_file(tmp_path / "base" / "model.safetensors")["model.norm.weight"]
    tensors["base_model.model.model.norm.weight"] = before
    save_file(tensors, file)
    folded(fields, tmp_path / "out")
    require_same("llama", tmp_path / "base", tmp_path / "out")


def test_tied_embeddings_that_no_adapter_has(tmp_path):
    options = dict(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    fields = saved("tied", tmp_path, {"one": options}).adapters
    with pytest.raises(InputError, match="the embeddings and the output layer in one"):
        folded(fields, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fields |= {"keep_from_base": ["model.embed_tokens.weight"]}
    folded(fields, tmp_path / "out")
    require_same("tied", tmp_path / "base", tmp_path / "out", changed=2)


@pytest.mark.parametrize("case", ["granularity", "interference", "whole"])
def test_fold_refuses_before_it_writes(llama, tmp_path, capfd, case):
    """On the command line, with coefficients that were learned before."""
    fields = llama.whole if case == "whole" else llama.adapters
    opened = open_models(parse_recipe(fields), Path("/"))
    granularity = "partition" if case == "granularity" else "tensor"
    options = {"groups": 3} if case == "granularity" else {}
    steps = (FittedStep("elect_sign", {}),) if case == "interference" else ()
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(opened, granularity, steps, **options).save(file)
    recipe = write_recipe(tmp_path, fields)
    arguments = [str(recipe), str(file), "--out", str(tmp_path / "out"), "--export.adapter"]
    with pytest.raises(SystemExit):
        cli.main(["fold", *arguments])
    assert "error: export.adapter: " in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fold_on_the_command_line(llama, tmp_path, capsys):
    opened = open_models(parse_recipe(llama.adapters), Path("/"))
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(opened, "column").save(file)
    recipe = write_recipe(tmp_path, llama.adapters)
    out = tmp_path / "out"
    cli.main(["fold", str(recipe), str(file), "--out", str(out), "--export.adapter"])
    assert f"adapter           {out / 'adapter'}" in capsys.readouterr().out
    require_same("llama", Path(llama.adapters["base"]), out)


def test_coefficients_of_adapters_with_another_scaling(llama, tmp_path):
    """The same factors times something else are another expert."""
    folder = shutil.copytree(llama.adapters["tasks"]["one"]["expert"], tmp_path / "one")
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(open_models(parse_recipe(llama.adapters), Path("/"))).save(file)
    tasks = llama.adapters["tasks"] | {
        "one": llama.adapters["tasks"]["one"] | {"expert": str(folder)}
    }
    recipe = parse_recipe(llama.adapters | {"tasks": tasks})
    jobs.fold_file(file, recipe, root=Path("/"), out=tmp_path / "same", console=quiet())
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 5}))
    with pytest.raises(InputError, match="has other contents"):
        jobs.fold_file(file, recipe, root=Path("/"), out=tmp_path / "other", console=quiet())
    assert not (tmp_path / "other").exists()


def test_the_recipe_of_a_run_says_that_there_is_an_adapter(llama):
    recipe = parse_recipe(llama.adapters | {"export": {"adapter": True}})
    assert isinstance(recipe, Recipe)
    assert (
        yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))["export"]["adapter"] is True
    )
    assert parse_recipe(llama.adapters).export.adapter is False
