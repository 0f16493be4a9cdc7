"""From checkpoints to task vectors, and from coefficients back to tensors."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from adamerge_jax.coefficients.granularities import GRANULARITIES, constant, make_granularity
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep, apply_steps
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.parameter_names import is_stacked, tensors_of, unstack
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.read import (
    load_backbone,
    load_expert,
    load_head,
    load_task_vectors,
    load_zero_shot_head,
)
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LoadedDelta, LowRankDelta
from tests.adapter_references import PLAIN, Adapters, save_experts
from tests.references import (
    BERT,
    TEXT_TASKS,
    edit_weights,
    fine_tune,
    random_coefficients,
    randomise,
    rename_weights,
)


def opened(fields: dict[str, Any]) -> Models:
    return open_models(parse_recipe(fields), Path("/"))


def files(fields: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The tensors of the base, and of each expert, as they are in their files."""
    folders = [fields["base"], *(task["expert"] for task in fields["tasks"].values())]
    base, *experts = (load_file(f"{folder}/model.safetensors") for folder in folders)
    return base, experts


def unstacked(models: Models, parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by the names of tensors."""
    tensors = {}
    for name, array in parameters.items():
        names = tensors_of(name, models.shapes[name])
        tensors |= dict(zip(names, array if is_stacked(name) else [array], strict=True))
    return {name: np.asarray(array) for name, array in tensors.items()}


def test_a_base_without_head_and_prefix(text_recipe):
    models = opened(text_recipe)
    base, experts = files(text_recipe)
    assert not any(name.startswith("bert.") for name in base)
    assert models.prefix == "bert."
    backbone = unstacked(models, load_backbone(models, models.base, None))
    assert {f"bert.{name}" for name in base} == backbone.keys()
    for name, array in base.items():
        np.testing.assert_array_equal(backbone[f"bert.{name}"], array)
    for expert, (task, classes) in zip(experts, TEXT_TASKS.items(), strict=True):
        head = load_head(models, task)
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        assert head["classifier.weight"].shape == (classes, BERT["hidden_size"])
        np.testing.assert_array_equal(head["classifier.bias"], expert["classifier.bias"])
    assert [source.name for source in models.sources] == ["base", *TEXT_TASKS]
    assert len({source.identity for source in models.sources}) == 4


def test_task_vectors_are_differences(text_recipe):
    models = opened(text_recipe)
    base, experts = files(text_recipe)
    deltas, mixed, _ = load_task_vectors(models, None)
    changed = [
        name
        for name in models.base.names
        if any((expert[name] != base[name.removeprefix("bert.")]).any() for expert in experts)
    ]
    assert sorted(mixed) == sorted(changed)
    # The experts' keys have the base's biases.
    keys = {f"bert.encoder.layer.{layer}.attention.self.key.bias" for layer in range(4)}
    assert set(models.base.names) - set(mixed) == keys
    assert "bert.encoder.layer.*.attention.self.key.bias" not in deltas
    for name, delta in deltas.items():
        values = delta.values if is_stacked(name) else [delta.values]
        for tensor, array in zip(models.tensors(name), values, strict=True):
            expected = [e[tensor] - base[tensor.removeprefix("bert.")] for e in experts]
            np.testing.assert_array_equal(array, expected)


def test_a_tensor_that_changed_in_one_layer_only(text_recipe, tmp_path):
    folders = {}
    for task, fields in text_recipe["tasks"].items():
        folders[task] = shutil.copytree(fields["expert"], tmp_path / task)
        fields["expert"] = str(folders[task])
    name = "bert.encoder.layer.2.attention.self.key.bias"
    edit_weights(folders["topic"], lambda tensors: tensors[name].__iadd__(1.0))
    deltas, mixed, _ = load_task_vectors(opened(text_recipe), None)
    assert name in mixed
    assert name.replace("2", "1") not in mixed
    values = np.asarray(deltas[name.replace("2", "*")].values)
    assert values.shape == (4, 3, BERT["hidden_size"])
    assert np.argwhere(values.any(-1)).tolist() == [[2, 1]]


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_an_expert_is_the_base_and_a_one_hot_coefficient(text_recipe, task):
    models = opened(text_recipe)
    base = load_backbone(models, models.base, None)
    expert = load_backbone(models, models.experts[task], None)
    deltas, *_ = load_task_vectors(models, None)
    granularity = GRANULARITIES["task"]({name: models.shapes[name] for name in deltas})
    one_hot = np.eye(3, dtype=np.float32)[[list(TEXT_TASKS).index(task)]]
    merged = jax.jit(lambda *trees: materialize(mix(*trees)))(
        base, deltas, granularity.scales({"all": one_hot})
    )
    assert merged.keys() == expert.keys() == models.shapes.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expert[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", ["task", "layer", "tensor"])
def test_fold(text_recipe, granularity):
    models = opened(text_recipe)
    coefficients = random_coefficients(models, granularity)
    base, experts = files(text_recipe)
    merged = dict(fold(models, coefficients))
    assert merged.keys() == set(models.base.names)
    in_file = [models.base.names[name] for name in merged]
    assert in_file == [name for name in models.base.checkpoint.tensors if name in in_file]
    assert {name.removeprefix("bert.") for name in merged} == base.keys()
    for name, array in merged.items():
        start = base[name.removeprefix("bert.")]
        assert array.dtype == start.dtype
        expected = start.astype(np.float64)
        if name in coefficients.parameters:
            group = {
                "task": "all",
                "tensor": name,
                "layer": ".".join(name.split(".")[: 4 if ".layer." in name else 2]),
            }[granularity]
            for scale, expert in zip(coefficients.values[group], experts, strict=True):
                expected = expected + np.float64(scale) * (expert[name] - start)
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6, err_msg=name)


TIES = (FittedStep("trim", {"density": 0.3}), FittedStep("elect_sign", {}))
UNEVEN = {
    "*.layer.0.attention.attention.*": 8,
    "*.layer.1.output.dense.weight": 3,
    "*.layer.1.*": 4,
}
HEADS = {"*.attention.attention.*": (0, 2), "*.attention.output.dense.weight": (1, 2)}
DARE = FittedStep("drop_and_rescale", {"drop": 0.5})


@pytest.mark.parametrize(
    ("granularity", "options", "interference"),
    [
        ("row", {}, TIES),
        ("row_column", {}, TIES),
        ("chunk", {"pieces": 7}, ()),
        ("chunk", {"pieces": UNEVEN}, TIES),
        ("partition", {"groups": 7, "seed": 1}, TIES),
        ("singular", {"rank": 4}, ()),
        ("singular", {"rank": 4}, TIES),
        ("head", {"heads": HEADS}, TIES),
        ("groups", {"patterns": {"first": ["*.layer.0.*"], "biases": ["*.bias"]}}, TIES),
        ("tensor", {}, (DARE, *TIES, FittedStep("disjoint_mean", {}))),
    ],
)
def test_fold_is_the_merge_in_memory(image_recipe, granularity, options, interference):
    models = opened(image_recipe)
    coefficients = random_coefficients(models, granularity, interference, **options)
    deltas, mixed, fitted = load_task_vectors(models, None, interference)
    assert coefficients.interference == fitted
    assert coefficients.parameters == tuple(mixed)
    shapes = {name: models.shapes[name] for name in deltas}
    stacked = make_granularity(granularity, options, shapes)
    values = {
        group: np.stack(
            [
                coefficients.values[each]
                for each in (unstack(group, len(array)) if is_stacked(group) else [group])
            ]
        ).astype(np.float32)
        for group, array in stacked.init(constant(shapes, 2, 0.0)).items()
    }
    assert sum(array.size for array in values.values()) == sum(
        array.size for array in coefficients.values.values()
    )
    merged = jax.jit(lambda *trees: materialize(mix(*trees)))(
        load_backbone(models, models.base, None),
        {name: stacked.prepare(name, delta) for name, delta in deltas.items()},
        stacked.scales(values),
    )
    in_memory = unstacked(models, merged)
    folded = dict(fold(models, coefficients))
    assert folded.keys() == in_memory.keys()
    for name, array in folded.items():
        np.testing.assert_allclose(array, in_memory[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_interference_changes_task_vectors(text_recipe):
    models = opened(text_recipe)
    before, mixed, none = load_task_vectors(models, None)
    after, same, fitted = load_task_vectors(models, None, TIES)
    assert none == ()
    assert same == mixed
    assert [step.name for step in fitted] == ["trim", "elect_sign"]
    assert len(fitted[0].fitted) == 3
    assert after.keys() == before.keys()
    entries, kept = 0, np.zeros(3, int)
    for name, delta in after.items():
        values, stacked = np.asarray(delta.values), is_stacked(name)
        start = np.asarray(before[name].values)
        for tensor, found, given in zip(
            models.tensors(name),
            values if stacked else [values],
            start if stacked else [start],
            strict=True,
        ):
            np.testing.assert_array_equal(found, apply_steps(fitted, tensor, given))
            trimmed = apply_steps(fitted[:1], tensor, given)
            entries += trimmed[0].size
            kept += np.count_nonzero(trimmed.reshape(3, -1), axis=1)
    np.testing.assert_allclose(kept / entries, 0.3, atol=2e-5)


@pytest.mark.parametrize("step", [*TIES, DARE, FittedStep("disjoint_mean", {})])
def test_interference_where_no_expert_differs(text_recipe, step):
    fields = text_recipe | {"keep_from_base": ["*"]}
    deltas, mixed, _ = load_task_vectors(opened(fields), None, [step])
    assert deltas == {}
    assert mixed == []


def test_fold_rounds_once(tmp_path):
    sizes = BERT | dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    base = randomise(BertModel(BertConfig(**sizes)))
    tasks = {}
    for seed in (1, 2, 3):
        config = BertConfig(**sizes, num_labels=2)
        expert = fine_tune(BertForSequenceClassification(config), base, seed)
        expert.bfloat16().save_pretrained(tmp_path / f"e{seed}")
        tasks[f"e{seed}"] = {"expert": str(tmp_path / f"e{seed}"), "calibration": "none"}
    base.bfloat16().save_pretrained(tmp_path / "base")
    fields = {"base": str(tmp_path / "base"), "tasks": tasks}
    models = opened(fields)
    coefficients = random_coefficients(models)
    start, experts = files(fields)
    differing = 0
    for name, array in fold(models, coefficients):
        assert array.dtype == ml_dtypes.bfloat16
        of_base = start[name.removeprefix("bert.")].astype(np.float64)
        exact = of_base.copy()
        for index, expert in enumerate(experts):
            scale = coefficients.values[name][index] if name in coefficients.values else 0.0
            exact += np.float64(scale) * (expert[name].astype(np.float64) - of_base)
        differing += int((array != exact.astype(ml_dtypes.bfloat16)).sum())
        # A sum that float32 puts on the other side of a tie may be one unit off, and no more.
        wide = array.astype(np.float64)
        np.testing.assert_allclose(wide, exact, rtol=2**-8, atol=1e-6)
    assert differing <= 3


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (["bert.embeddings.*"], lambda name: ".embeddings." in name),
        (
            ["*.bias", "bert.pooler.dense.weight"],
            lambda name: name.endswith("bias") or name == "bert.pooler.dense.weight",
        ),
        (["*.layer.0.*"], lambda name: ".layer.0." in name),
    ],
)
def test_keep_from_base(text_recipe, patterns, kept):
    models = opened(text_recipe | {"keep_from_base": patterns})
    assert models.kept_from_base == {name for name in models.base.names if kept(name)}
    _, mixed, _ = load_task_vectors(models, None)
    everything = set(load_task_vectors(opened(text_recipe), None)[1])
    assert set(mixed) == everything - models.kept_from_base
    coefficients = random_coefficients(models)
    base, _ = files(text_recipe)
    for name, array in fold(models, coefficients):
        same = np.array_equal(array, base[name.removeprefix("bert.")])
        assert same == (name not in mixed)


def test_coefficients_of_another_architecture(text_recipe, image_recipe):
    coefficients = random_coefficients(opened(image_recipe))
    with pytest.raises(InputError, match=r"coefficients mix vit\..*does not have"):
        list(fold(opened(text_recipe), coefficients))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_whole_clip_and_vision_only_experts(clip_recipe, tmp_path, prefixed):
    """The prefix of a CLIP's vision tower comes and goes with versions of `transformers`."""

    def with_prefix(name: str) -> str:
        return name if name.startswith("vision_model.") else f"vision_model.{name}"

    def without_prefix(name: str) -> str:
        return name.removeprefix("vision_model.")

    references, _ = files(clip_recipe)
    for task, fields in clip_recipe["tasks"].items():
        folder = shutil.copytree(fields["expert"], tmp_path / task)
        rename_weights(folder, with_prefix if prefixed else without_prefix)
        fields["expert"] = str(folder)
    models = opened(clip_recipe)
    assert models.prefix == ""
    assert models.kept_from_base == {"visual_projection.weight"}
    deltas, mixed, _ = load_task_vectors(models, None)
    assert "visual_projection.weight" not in deltas
    assert all(name.startswith("vision_model.") for name in mixed)
    assert all(load_head(models, task) == {} for task in models.experts)
    # An expert is evaluated with the base's projection.
    for task, expert in models.experts.items():
        tensors = load_file(f"{clip_recipe['tasks'][task]['expert']}/model.safetensors")
        tensors = {with_prefix(name): array for name, array in tensors.items()}
        backbone = unstacked(models, load_backbone(models, expert, None))
        projection = backbone.pop("visual_projection.weight")
        np.testing.assert_array_equal(projection, references["visual_projection.weight"])
        for name, array in backbone.items():
            np.testing.assert_array_equal(array, tensors[name], err_msg=name)
    merged = dict(fold(models, random_coefficients(models)))
    assert merged.keys() == {n for n in references if n.startswith(("vision_", "visual_"))}


def test_zero_shot_heads_come_from_the_base(clip_recipe):
    head = load_zero_shot_head(opened(clip_recipe), ["cat", "dog"], ["a photo of a {}."])
    assert head["text_embeddings"].shape == (2, 10)
    base, _ = files(clip_recipe)
    assert head["logit_scale"] == base["logit_scale"]


def test_zero_shot_heads_need_a_tokenizer(clip_recipe, tmp_path):
    """Without one, `transformers` makes one to which every class is the same unknown token."""
    base = shutil.copytree(clip_recipe["base"], tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    models = opened(clip_recipe | {"base": str(base)})
    with pytest.raises(InputError, match=r"base \(.*\) has no tokenizer"):
        load_zero_shot_head(models, ["cat", "dog"], ["a photo of a {}."])


def test_loading_in_another_dtype(text_recipe):
    models = opened(text_recipe)
    dtype = np.dtype(ml_dtypes.bfloat16)
    base, _ = files(text_recipe)
    backbone = unstacked(models, load_backbone(models, models.base, dtype))
    for name, array in base.items():
        np.testing.assert_array_equal(backbone[f"bert.{name}"], array.astype(dtype))
    deltas, *_ = load_task_vectors(models, dtype)
    assert {delta.values.dtype for delta in deltas.values()} == {dtype}


SAVED = dict(
    r=2, target_modules=["q_proj", "up_proj", "embed_tokens"], modules_to_save=["model.norm"]
)
# Of the stacked `up_proj`, the first layer has factors and the second is saved whole.
MIXED = dict(
    r=2,
    target_modules=["q_proj", "up_proj"],
    layers_to_transform=[0],
    modules_to_save=["layers.1.mlp.up_proj", "layers.1.input_layernorm"],
)
WITH_SAVED: Adapters = {"one": PLAIN["one"], "saved": SAVED, "mixed": MIXED}
UP = "model.layers.*.mlp.up_proj.weight"


class Pair(NamedTuple):
    """One merge of adapters, and the same of the models that PEFT makes of them."""

    adapters: Models
    whole: Models


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Pair:
    """Adapters only, with nothing saved whole."""
    fields = save_experts("llama", tmp_path_factory.mktemp("plain"))
    return Pair(*map(opened, fields))


@pytest.fixture(scope="module")
def mixed_forms(tmp_path_factory) -> Pair:
    """One whole model and two adapters, with tensors saved whole."""
    adapters, whole = save_experts("llama", tmp_path_factory.mktemp("mixed"), WITH_SAVED)
    adapters["tasks"]["one"] = whole["tasks"]["one"]
    return Pair(opened(adapters), opened(whole))


@pytest.fixture(params=["plain", "mixed_forms"])
def pair(request) -> Pair:
    return request.getfixturevalue(request.param)


def entries(delta: LoadedDelta, stacked: bool) -> np.ndarray:
    """Deltas of any representation as `[K, *shape]` or `[L, K, *shape]`."""
    if isinstance(delta, DenseDelta):
        return np.asarray(delta.values)
    if isinstance(delta, LowRankDelta):
        return np.asarray(delta.left) @ np.asarray(delta.right)
    parts = [entries(part, stacked) for part in delta.parts]
    shape = list(parts[0].shape)
    shape[int(stacked)] = delta.count
    values = np.zeros(shape)
    for part, experts in zip(parts, delta.experts, strict=True):
        values[(slice(None), list(experts)) if stacked else list(experts)] += part
    return values


# The built-out experts round the sums of weights of the order of 1 to float32.
BUILT_OUT = dict(rtol=1e-5, atol=1e-6)


def test_task_vectors_of_adapters(pair):
    deltas, mixed, _ = load_task_vectors(pair.adapters, None)
    expected, same, _ = load_task_vectors(pair.whole, None)
    assert mixed == same
    assert deltas.keys() == expected.keys()
    for name, delta in deltas.items():
        found, wanted = entries(delta, is_stacked(name)), expected[name].values
        np.testing.assert_allclose(found, wanted, err_msg=name, **BUILT_OUT)
        norms = [each.norms(stacked=is_stacked(name)) for each in (delta, expected[name])]
        np.testing.assert_allclose(*norms, rtol=1e-5, atol=1e-5)


def test_task_vectors_stay_factors(plain, mixed_forms):
    deltas, *_ = load_task_vectors(plain.adapters, None)
    query = deltas["model.layers.*.self_attn.q_proj.weight"]
    assert isinstance(query, LowRankDelta)
    assert query.left.shape == (2, 3, 16, 3)
    # Expert `two` has none of these; no dense deltas are made for it.
    assert [type(part) for part in deltas[UP].parts] == [LowRankDelta]
    assert deltas[UP].experts == ((0, 2),)
    deltas, mixed, _ = load_task_vectors(mixed_forms.adapters, None)
    assert [type(part) for part in deltas[UP].parts] == [LowRankDelta, DenseDelta]
    assert deltas[UP].experts == ((1, 2), (0, 2))
    assert isinstance(deltas["model.norm.weight"], DenseDelta)
    assert isinstance(deltas["model.embed_tokens.weight"], JoinedDelta)
    assert "model.layers.0.input_layernorm.weight" not in mixed
    assert "model.layers.1.input_layernorm.weight" in mixed


def test_experts_of_adapters(pair):
    base = load_backbone(pair.adapters, pair.adapters.base, None)
    for task in pair.adapters.experts:
        found, expected = (
            materialize(load_expert(models, task, base, None))
            for models in (pair.adapters, pair.whole)
        )
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], err_msg=name, **BUILT_OUT)


def test_an_adapter_is_an_expert_whatever_is_kept_from_the_base(mixed_forms):
    kept = dataclasses.replace(
        mixed_forms.adapters, kept_from_base=frozenset(mixed_forms.adapters.base.names)
    )
    assert load_task_vectors(kept, None)[0] == {}
    base = load_backbone(kept, kept.base, None)
    found = materialize(load_expert(kept, "saved", base, None))
    expected = load_backbone(mixed_forms.whole, mixed_forms.whole.experts["saved"], None)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], err_msg=name, **BUILT_OUT)


@pytest.mark.parametrize(
    ("granularity", "options", "interference"),
    [
        ("tensor", {}, ()),
        ("row", {}, ()),
        ("column", {}, ()),
        ("row_column", {}, ()),
        ("partition", {"groups": 5, "seed": 1}, ()),
        ("singular", {"rank": 3}, ()),
        # Not `trim`: rounding decides which side of the threshold the entry that sets it is on.
        ("tensor", {}, TIES[1:]),
    ],
)
def test_fold_of_adapters(pair, granularity, options, interference):
    coefficients = random_coefficients(pair.whole, granularity, interference, **options)
    merged = dict(fold(pair.adapters, coefficients))
    expected = dict(fold(pair.whole, coefficients))
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=5e-6, err_msg=name)


def test_interference_multiplies_out(plain):
    deltas, mixed, fitted = load_task_vectors(plain.adapters, None, TIES)
    expected, same, of_whole = load_task_vectors(plain.whole, None, TIES)
    assert mixed == same
    assert all(isinstance(delta, DenseDelta) for delta in deltas.values())
    np.testing.assert_allclose(fitted[0].fitted, of_whole[0].fitted, rtol=1e-4)
    for name, delta in deltas.items():
        np.testing.assert_allclose(delta.values, expected[name].values, rtol=1e-4, atol=1e-6)


def test_factors_in_another_dtype(plain):
    dtype = np.dtype(ml_dtypes.bfloat16)
    deltas, *_ = load_task_vectors(plain.adapters, dtype)
    arrays = jax.tree.leaves(deltas)
    assert {array.dtype for array in arrays} == {dtype}
    default, *_ = load_task_vectors(plain.adapters, None)
    assert {array.dtype for array in jax.tree.leaves(default)} == {np.dtype(np.float32)}


def test_unused_towers_and_heads_of_adapters(tmp_path):
    """A CLIP's adapter may change the text tower; the vision tower is what is merged."""
    options = dict(r=2, target_modules=["q_proj", "fc1"])
    adapters, whole = map(opened, save_experts("clip", tmp_path, {"one": options}))
    file = load_file(tmp_path / "adapters" / "one" / "adapter_model.safetensors")
    assert any("text_model" in name for name in file)
    _, mixed, _ = load_task_vectors(adapters, None)
    assert mixed == load_task_vectors(whole, None)[1]
    assert len(mixed) == 4
