"""LoRA adapters, made and merged by PEFT itself, read as experts and written as merges."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from adamerge_jax.checkpoints.peft import MatchedAdapter, is_adapter
from adamerge_jax.checkpoints.peft_config import CONFIG_FILE, WEIGHTS_FILE
from adamerge_jax.checkpoints.peft_export import AdapterWeights, save_adapter
from adamerge_jax.errors import InputError
from adamerge_jax.models.problem import NUMBERS
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.read import load_head, load_task_vectors
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import BERT, save_base, train
from tests.references import randomise

Edit = Callable[[dict[str, Any]], object]

# A product of factors of rank at most 8 and its scaling, in float32 in one order and another.
MERGED = dict(rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Folders of a BERT without a head, a LLaMA, and one with tied embeddings."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, root / kind) for kind in ("bert", "llama", "tied")}


def classifier(base: Path, classes: int = 3) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(base, num_labels=classes).eval()


def opened(base: Path, folder: Path) -> Models:
    fields = {"base": str(base), "tasks": {"t": {"expert": str(folder), "calibration": "none"}}}
    return open_models(parse_recipe(fields), Path("/"))


def require_merged(models: Models, merged: PreTrainedModel) -> list[str]:
    """Every parameter reads as PEFT merged it, and `low_rank` and `changes` say the same.

    Returns:
        The names of the parameters that have factors.
    """
    adapter = models.experts["t"]
    assert isinstance(adapter, MatchedAdapter)
    expected = {name: array.numpy() for name, array in merged.state_dict().items()}
    assert adapter.names.keys() <= expected.keys()
    factored = []
    for name in adapter.names:
        found = adapter.read(name)
        np.testing.assert_allclose(found, expected[name], err_msg=name, **MERGED)
        if name not in models.base.names:
            continue
        before = models.base.read(name)
        factors = adapter.low_rank(name)
        assert (factors is not None) == adapter.has_factors(name)
        if factors is not None:
            factored.append(name)
            difference = factors.left @ factors.right
            np.testing.assert_allclose(difference, expected[name] - before, rtol=0, atol=1e-6)
        if not adapter.changes(name):
            np.testing.assert_array_equal(found, before)
    return factored


LLAMA_CASES: dict[str, dict[str, Any]] = {
    "rank 1": dict(r=1, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    "rank 8": dict(r=8, lora_alpha=2, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["v_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
        alpha_pattern={"v_proj": 5, r"^model\.layers\.0\.mlp\.up_proj": 1},
    ),
    "patterns, rslora": dict(
        r=4,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r".*\.1\..*q_proj": 2},
        alpha_pattern={"q_proj": 3},
    ),
    "regex": dict(r=2, target_modules=r".*layers\.1\.(self_attn\.(q|o)_proj|mlp\..*_proj)"),
    "all-linear": dict(r=2, target_modules="all-linear"),
    "some layers": dict(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    "embeddings": dict(r=2, lora_alpha=3, target_modules=["q_proj", "embed_tokens"]),
    "embeddings, rslora": dict(r=4, use_rslora=True, target_modules=["embed_tokens"]),
    "output": dict(r=2, target_modules=["lm_head"]),
    "saved norm": dict(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "saved embeddings": dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved output": dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved layer": dict(
        r=2,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0],
        modules_to_save=["layers.1.mlp.up_proj"],
    ),
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_a_language_model_reads_as_peft_merges_it(bases, tmp_path, case):
    model = LlamaForCausalLM.from_pretrained(bases["llama"])
    config = LoraConfig(task_type="CAUSAL_LM", **LLAMA_CASES[case])
    adapted = train(model, tmp_path, config)
    models = opened(bases["llama"], tmp_path)
    factored = require_merged(models, adapted.merge_and_unload())
    assert factored
    if case == "some layers":
        assert factored == ["model.layers.1.self_attn.q_proj.weight"]
    if case == "all-linear":
        assert len(factored) == 14
    if case == "embeddings":
        # The table as it was in the base lies in the file too, and is no change.
        names = load_file(tmp_path / WEIGHTS_FILE)
        assert "base_model.model.model.embed_tokens.base_layer.weight" in names
        assert "model.embed_tokens.weight" not in models.experts["t"].saved


@pytest.mark.parametrize("rslora", [False, True])
def test_a_dora_reads_as_peft_merges_it(bases, tmp_path, rslora):
    """Its change is no product of factors: it is read whole."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=rslora)
    adapted = train(LlamaForCausalLM.from_pretrained(bases["llama"]), tmp_path, config)
    models = opened(bases["llama"], tmp_path)
    expert, merged = models.experts["t"], adapted.merge_and_unload().state_dict()
    changed = [name for name in models.base.names if expert.changes(name)]
    assert len(changed) == 4 and not models.only_adapters
    for name in models.base.names:
        assert not expert.has_factors(name) and expert.low_rank(name) is None
        np.testing.assert_allclose(expert.read(name), merged[name], err_msg=name, **MERGED)


def test_a_dora_without_its_magnitudes(bases, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    train(LlamaForCausalLM.from_pretrained(bases["llama"]), tmp_path, config)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    vector = next(name for name in tensors if "magnitude" in name)
    for damaged, said in (
        ({name: array for name, array in tensors.items() if name != vector}, "has no lora_magnit"),
        (tensors | {vector: tensors[vector][:-1].copy()}, "15,) for 16 outputs"),
    ):
        save_file(damaged, tmp_path / WEIGHTS_FILE)
        refused(bases["llama"], tmp_path, said, "copy the adapter again")
    edit_config(tmp_path, use_dora="yes")
    refused(bases["llama"], tmp_path, "use_dora 'yes'", "neither true nor false")


def test_tied_embeddings(bases, tmp_path):
    """The expert is what PEFT computes unmerged; its merge adds the table's change twice."""
    model = LlamaForCausalLM.from_pretrained(bases["tied"])
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapted = train(model, tmp_path, config)
    expert = opened(bases["tied"], tmp_path).experts["t"]
    alone = LlamaForCausalLM.from_pretrained(bases["tied"]).eval()
    tensors = {name: torch.from_numpy(expert.read(name)) for name in expert.names}
    alone.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        np.testing.assert_allclose(alone(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_saved_under_both_names(bases, tmp_path):
    model = LlamaForCausalLM.from_pretrained(bases["tied"])
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    adapted = train(model, tmp_path, config)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS_FILE)
    require_merged(opened(bases["tied"], tmp_path), adapted.merge_and_unload())


BERT_CASES: dict[str, dict[str, Any]] = {
    "list": dict(r=2, target_modules=["query", "value"]),
    "all-linear": dict(r=2, target_modules="all-linear"),
    "patterns": dict(
        r=4, target_modules=["query", "dense"], rank_pattern={"pooler.dense": 1, "query": 2}
    ),
    "every bias": dict(r=2, target_modules=["query"], bias="all"),
    "the biases beside factors": dict(r=2, target_modules=["query", "dense"], bias="lora_only"),
    "embeddings": dict(r=2, target_modules=["query", "word_embeddings"]),
    "saved norm": dict(
        r=2, target_modules=["query"], modules_to_save=["classifier", "embeddings.LayerNorm"]
    ),
}


@pytest.mark.parametrize("case", BERT_CASES)
def test_a_classifier_reads_as_peft_merges_it(bases, tmp_path, case):
    model = classifier(bases["bert"])
    adapted = train(model, tmp_path, LoraConfig(task_type="SEQ_CLS", **BERT_CASES[case]))
    models = opened(bases["bert"], tmp_path)
    merged = adapted.merge_and_unload()
    assert require_merged(models, merged)
    head = load_head(models, "t")
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    for name, array in head.items():
        np.testing.assert_array_equal(array, merged.state_dict()[name])
    assert models.experts["t"].checkpoint.config.num_labels == 3
    assert models.config.num_labels == 2
    # The task vectors are those of the model that was merged.
    _, mixed, _ = load_task_vectors(models, None)
    before = {f"bert.{n}": a for n, a in load_file(bases["bert"] / "model.safetensors").items()}
    after = {name: array.numpy() for name, array in merged.state_dict().items()}
    changed = {name for name in before if (after[name] != before[name]).any()}
    assert set(mixed) == changed


def test_an_adapter_of_the_bare_model(bases, tmp_path):
    """Its names lack `model.`, as those of a LLaMA without its output layer do."""
    model = LlamaModel.from_pretrained(bases["llama"])
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    adapted = train(model, tmp_path, config)
    adapter = opened(bases["llama"], tmp_path).experts["t"]
    for name, array in adapted.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(adapter.read(f"model.{name}"), array, **MERGED)
    head = adapter.base.read("lm_head.weight")
    np.testing.assert_array_equal(adapter.read("lm_head.weight"), head)


def test_an_adapter_of_the_bare_bert(bases, tmp_path):
    """A classifier's adapter trained as `BertModel`, with a head added under its own name."""
    model = BertModel.from_pretrained(bases["bert"])
    adapted = train(model, tmp_path, LoraConfig(r=2, target_modules=["query", "dense"]))
    head = {"classifier.weight": np.ones((3, 16)), "classifier.bias": np.ones(3)}
    edit_tensors(
        tmp_path,
        lambda t: t.update({f"base_model.model.{n}": a.astype("f4") for n, a in head.items()}),
    )
    adapter = opened(bases["bert"], tmp_path).experts["t"]
    for name, array in adapted.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(adapter.read(f"bert.{name}"), array, **MERGED)


def test_half_precision_factors(bases, tmp_path):
    model = LlamaForCausalLM.from_pretrained(bases["llama"])
    train(model, tmp_path, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    edit_tensors(tmp_path, lambda t: t.update({n: a.astype("f2") for n, a in t.items()}))
    factors = (
        opened(bases["llama"], tmp_path)
        .experts["t"]
        .low_rank("model.layers.0.self_attn.q_proj.weight")
    )
    assert factors.left.dtype == factors.right.dtype == np.float32
    stored = load_file(tmp_path / WEIGHTS_FILE)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    expected = stored[f"{module}.lora_B.weight"].astype("f4") * 1.5
    np.testing.assert_array_equal(factors.left, expected)


def test_untrained_factors_change_nothing(bases, tmp_path):
    """PEFT starts with B = 0."""
    model = LlamaForCausalLM.from_pretrained(bases["llama"])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert load_task_vectors(opened(bases["llama"], tmp_path), None) == ({}, [], ())


def test_what_is_an_adapter(bases, tmp_path):
    assert not is_adapter(bases["llama"])
    model = LlamaForCausalLM.from_pretrained(bases["llama"])
    train(model, tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    assert is_adapter(tmp_path)
    # Trainers leave the base's config there too, which makes it no whole model.
    (tmp_path / "config.json").write_text((bases["llama"] / "config.json").read_text())
    assert is_adapter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_adapter(tmp_path)


def test_identity(bases, tmp_path):
    """Two adapters that differ in what their factors are multiplied with are not one."""
    identities = []
    for folder, alpha, seed in (("a", 4, 0), ("b", 4, 0), ("c", 8, 0), ("d", 4, 1)):
        model = LlamaForCausalLM.from_pretrained(bases["llama"])
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
        train(model, tmp_path / folder, config, seed)
        identities.append(opened(bases["llama"], tmp_path / folder).sources[1].identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.fixture
def adapter(bases, tmp_path) -> Path:
    """A good adapter of the classifier, to be damaged."""
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    train(classifier(bases["bert"]), tmp_path / "adapter", config)
    return tmp_path / "adapter"


def refused(base: Path, folder: Path, *said: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(base, folder)
    message = str(caught.value)
    assert "\n" not in message
    for each in ("expert 't'", str(folder), *said):
        assert each in message, message


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


def transposed(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QUERY}.lora_A.weight"] = np.ascontiguousarray(tensors[f"{QUERY}.lora_A.weight"].T)


def cut(tensors: dict[str, np.ndarray]) -> None:
    name = f"{QUERY}.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])


def deepened(tensors: dict[str, np.ndarray]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"{QUERY.replace('.1.', '.7.')}.{part}.weight"] = tensors[f"{QUERY}.{part}.weight"]


def convolved(tensors: dict[str, np.ndarray]) -> None:
    name = f"{QUERY}.lora_A.weight"
    tensors[name] = tensors[name][..., None, None]


DAMAGES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no B": (lambda t: t.pop(f"{QUERY}.lora_B.weight"), ("lora_A.weight without", "lora_B.weight")),
    "no A": (lambda t: t.pop(f"{QUERY}.lora_A.weight"), ("lora_B.weight without", "lora_A.weight")),
    "no product": (transposed, ("lora_A.weight of shape (16, 2)", "have no product")),
    "another width": (cut, ("query.weight of shape (16, 15), the base's has (16, 16)",)),
    "a layer too many": (deepened, ("layer.7.attention.self.query.weight", "does not have")),
    "a convolution": (convolved, ("(2, 16, 1, 1)", "merge_and_unload()")),
    "no head": (
        lambda t: [t.pop(f"base_model.model.classifier.{e}") for e in ("weight", "bias")],
        ("lacks classifier", "modules_to_save"),
    ),
    "half a head": (
        lambda t: t.pop("base_model.model.classifier.bias"),
        ("lacks classifier.bias", "modules_to_save"),
    ),
    "an unknown tensor": (
        lambda t: t.update({"base_model.model.bert.extra.weight": np.ones(3, "f4")}),
        ("changes bert.extra.weight", "does not have"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(bases, adapter, damage):
    edit, said = DAMAGES[damage]
    edit_tensors(adapter, edit)
    refused(bases["bert"], adapter, *said)


def test_another_base(bases, tmp_path, adapter):
    wide = BertModel(BertConfig(**BERT | {"hidden_size": 32}))
    wide.save_pretrained(tmp_path / "wide")
    refused(tmp_path / "wide", adapter, "(16, 16)", "(32, 32)", "trained on the base")
    LlamaModel.from_pretrained(bases["llama"], pad_token_id=0).save_pretrained(tmp_path / "llama")
    refused(tmp_path / "llama", adapter, "bert.encoder", "does not have")


def test_values_that_are_not_finite(bases, adapter):
    edit_tensors(adapter, lambda t: t[f"{QUERY}.lora_B.weight"].__setitem__((3, 1), np.nan))
    expert = opened(bases["bert"], adapter).experts["t"]
    with pytest.raises(InputError, match=rf"expert 't' .*{re.escape(QUERY)}.* 1 NaN .*\[3, 1\]"):
        expert.low_rank("bert.encoder.layer.1.attention.self.query.weight")


def test_files_that_cannot_be_read(bases, adapter):
    weights = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(weights[:-100])
    refused(bases["bert"], adapter, "bytes where its header describes")
    (adapter / WEIGHTS_FILE).unlink()
    refused(bases["bert"], adapter, f"has no {WEIGHTS_FILE}", "save_pretrained")
    (adapter / WEIGHTS_FILE).write_bytes(weights)
    for text in ("{", "[]"):
        (adapter / CONFIG_FILE).write_text(text)
        refused(bases["bert"], adapter, CONFIG_FILE)


def test_kinds_that_are_no_plain_lora(bases, tmp_path):
    ia3 = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    train(classifier(bases["bert"]), tmp_path / "ia3", ia3)
    refused(bases["bert"], tmp_path / "ia3", "of type 'IA3'", "merge_and_unload()")
    pissa = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights="pissa")
    train(classifier(bases["bert"]), tmp_path / "pissa", pissa)
    refused(
        bases["bert"], tmp_path / "pissa", "'pissa'", "path_initial_model_for_weight_conversion"
    )


def test_a_head_that_is_only_factors(bases, tmp_path):
    """Without task_type PEFT saves no head, and adapts one that it never saves."""
    train(classifier(bases["bert"]), tmp_path, LoraConfig(r=2, target_modules="all-linear"))
    refused(bases["bert"], tmp_path, "factors for classifier.weight", "modules_to_save")


def test_a_head_for_a_number(bases, tmp_path):
    """As that of a regression or a reward model: its expert gives numbers."""
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    train(classifier(bases["bert"], classes=1), tmp_path, config)
    assert opened(bases["bert"], tmp_path).problems == {"t": NUMBERS}


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
    ],
)
def test_embeddings_and_output_layer_apart_where_the_base_ties_them(bases, tmp_path, options):
    model = LlamaForCausalLM.from_pretrained(bases["tied"])
    train(model, tmp_path, LoraConfig(r=2, **options))
    said = ["lm_head.weight"]
    if options["target_modules"][-1] != "lm_head":
        said = ["model.embed_tokens.weight differ from the output layer", "ensure_weight_tying"]
    refused(bases["tied"], tmp_path, *said)


def test_a_copy_of_tied_embeddings(bases, tmp_path):
    """As `save_embedding_layers=True` leaves it."""
    model = LlamaForCausalLM.from_pretrained(bases["tied"])
    adapted = train(model, tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS_FILE)
    require_merged(opened(bases["tied"], tmp_path), adapted.merge_and_unload())


def weights_of(shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, AdapterWeights]:
    """Random factors by module, from `(m, r, n)`."""
    generator = np.random.default_rng(0)
    return {
        module: AdapterWeights(
            generator.normal(size=(r, n)).astype("f4"),
            generator.normal(size=(m, r)).astype("f4"),
            "embedding" if "embed" in module else "linear",
        )
        for module, (m, r, n) in shapes.items()
    }


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_peft_loads_what_is_written(bases, tmp_path, task_type):
    modules = weights_of(
        {
            "model.layers.0.self_attn.q_proj": (16, 3, 16),
            "model.layers.1.self_attn.q_proj": (16, 5, 16),
            "model.layers.1.mlp.down_proj": (16, 1, 24),
            "model.embed_tokens": (40, 2, 16),
            "lm_head": (40, 4, 16),
        }
    )
    folder = tmp_path / "new" / "adapter"
    save_adapter(folder, modules, base=str(bases["llama"]), task_type=task_type)
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    model = LlamaForCausalLM.from_pretrained(bases["llama"])
    before = copy.deepcopy(model.state_dict())
    adapted = PeftModel.from_pretrained(model, folder)
    assert adapted.peft_config["default"].task_type == task_type
    model = adapted.merge_and_unload()
    merged = model.state_dict()
    for name, array in before.items():
        expected = array.numpy()
        if name.removesuffix(".weight") in modules:
            weights = modules[name.removesuffix(".weight")]
            expected = expected + weights.b @ weights.a
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-6, atol=2e-6)
    # And it is an expert like any other.
    require_merged(opened(bases["llama"], folder), model)


def test_an_adapter_is_written_to_a_new_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        save_adapter(tmp_path, weights_of({"a": (2, 1, 2)}), base="b", task_type=None)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("electra", ["query", "key", "value", "dense", "embeddings_project"]),
        ("mpnet", ["q", "k", "v", "o", "dense", "relative_attention_bias"]),
    ],
)
def test_encoders_with_heads_of_two_layers(tmp_path, kind, modules):
    """The base lacks the prefix that the adapter's names have."""
    config = AutoConfig.for_model(kind, **BERT, num_labels=3)
    randomise(AutoModel.from_config(config)).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    options = LoraConfig(
        r=2, target_modules=modules, exclude_modules=["classifier.dense"], task_type="SEQ_CLS"
    )
    merged = train(model, tmp_path / "adapter", options).merge_and_unload()
    models = opened(tmp_path / "base", tmp_path / "adapter")
    assert not models.family.bridged
    # In each of two layers six matrices, and one beside the layers.
    assert len(require_merged(models, merged)) == 2 * 6 + 1
    assert {*models.head_names("t")} == {
        f"classifier.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("names", ["of now", "of before"])
def test_a_vision_transformer(bases, tmp_path, names):
    """In memory its modules have other names than in files; with older adapters they have not."""
    base = save_base("vit", tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(
        r=2, target_modules=r".*(q_proj|o_proj|fc\d)", modules_to_save=["classifier", "layernorm"]
    )
    adapted = train(model, tmp_path / "adapter", config)
    if names == "of before":
        by_now = {
            "layers.": "encoder.layer.",
            "attention.q_proj": "attention.attention.query",
            "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }

        def rename(tensors: dict[str, np.ndarray]) -> None:
            for name in list(tensors):
                before = name
                for now, then in by_now.items():
                    before = before.replace(now, then)
                tensors[before] = tensors.pop(name)

        edit_tensors(tmp_path / "adapter", rename)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    expert = opened(base, tmp_path / "adapter").experts["t"]
    assert len(expert.factors) == 2 * 4
    assert expert.names.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(expert.read(name), array, err_msg=name, **MERGED)
