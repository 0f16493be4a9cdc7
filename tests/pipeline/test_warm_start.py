"""Where learning starts when something was learned before."""

import copy
import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertModel

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import GRANULARITIES, make_granularity, same_options
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.warm_start import (
    WarmStart,
    initial_values,
    open_warm_start,
    start_from_file,
)
from adamerge_jax.recipes.build import GranularityChoice, build
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.registry import allow_code
from tests.references import (
    BERT,
    edit_weights,
    fine_tune,
    learning_inputs,
    random_coefficients,
    randomise,
    write_recipe,
)

INITIAL = 0.3

SHAPES = {
    "embed.weight": (6, 4),
    "layer.*.dense.weight": (2, 4, 6),
    "layer.*.dense.bias": (2, 4),
    "pooler.weight": (4, 4),
}
TENSORS = {
    "embed.weight": (6, 4),
    **{f"layer.{i}.dense.weight": (4, 6) for i in range(2)},
    **{f"layer.{i}.dense.bias": (4,) for i in range(2)},
    "pooler.weight": (4, 4),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {"patterns": {"dense": ["*.dense.weight", "pooler.*"], "first": ["layer.0.*"]}},
    "head": {"heads": {"*.dense.weight": (0, 2), "pooler.weight": (1, 2)}},
    "chunk": {"pieces": 3},
    "partition": {"groups": 4, "seed": 1},
    "singular": {"rank": 2},
}
OWN = "tests.own_granularity:rows"


@pytest.fixture(autouse=True)
def own_granularity_is_allowed(no_code_is_allowed: None) -> None:
    allow_code([OWN])


ALONG_AXES = ["task", "layer", "tensor", "groups", "head", "row", "column"]


def learned(granularity: str, experts: int = 2) -> Coefficients:
    """Random coefficients of all tensors."""
    options = OPTIONS.get(granularity, {})
    start = {name: np.zeros((1, experts), np.float32) for name in TENSORS}
    generator = np.random.default_rng(0)
    groups = make_granularity(granularity, options, TENSORS).init(start)
    return Coefficients(
        values={g: generator.normal(size=own.shape[1:]).astype("f4") for g, own in groups.items()},
        granularity=granularity,
        granularity_options=options,
        interference=(),
        constraint="free",
        shapes=TENSORS,
        base=None,
        experts=(None,) * experts,
        objective="entropy",
        seed=0,
        step=1,
    )


def started(start: WarmStart, granularity: str, constraint: str = "free", experts: int = 2):
    options = OPTIONS.get(granularity, {})
    target = make_granularity(granularity, options, SHAPES)
    rule = CONSTRAINTS[constraint]
    return target, initial_values(
        start, target, GranularityChoice(granularity, options), rule, SHAPES, experts
    )


def whole(scale: Any, name: str) -> np.ndarray:
    """A scale, one number for every parameter: `[K, *shape]`, or `[L, K, *shape]`."""
    shape = SHAPES[name]
    experts = scale.shape[1 if is_stacked(name) else 0]
    full = (shape[0], experts, *shape[1:]) if is_stacked(name) else (experts, *shape)
    return np.broadcast_to(np.asarray(scale, np.float64), full)


@pytest.mark.parametrize("after", ALONG_AXES)
@pytest.mark.parametrize("before", ["row", "column"])
def test_coefficients_start_at_the_mean_over_their_parameters(before, after):
    source = learned(before)
    scales = {name: np.asarray(scale) for name, scale in source.scales().items()}
    target, values = started(WarmStart(scales, INITIAL, "file"), after)
    # A number of its own for each coefficient says which parameters it is for.
    ends = np.cumsum([0, *(own.size for own in values.values())])
    numbers = {
        group: np.arange(end, end + own.size, dtype=np.float32).reshape(own.shape)
        for (group, own), end in zip(values.items(), ends, strict=False)
    }
    total, count = np.zeros(ends[-1]), np.zeros(ends[-1])
    for name, scale in target.scales(numbers).items():
        places = whole(scale, name).astype(int).ravel()
        if is_stacked(name):
            layers = [scales[name.replace("*", str(i))] for i in range(SHAPES[name][0])]
            given = whole(np.stack(layers), name)
        else:
            given = whole(scales[name], name)
        total += np.bincount(places, given.ravel(), ends[-1])
        count += np.bincount(places, minlength=ends[-1])
    found = np.concatenate([np.ravel(own) for own in values.values()])
    np.testing.assert_allclose(found, total / count, rtol=1e-5, atol=1e-6)


def test_a_granularity_of_ones_own_starts_by_row_as_the_built_in_one_does():
    source = learned("column")
    scales = {name: np.asarray(scale) for name, scale in source.scales().items()}
    start = WarmStart(scales, INITIAL, "file", learned=source)
    _, expected = started(start, "row")
    _, values = started(start, OWN)
    for name in ("layer.*.dense.weight", "layer.*.dense.bias", "pooler.weight"):
        np.testing.assert_array_equal(values[name], expected[name])
    by_row = learned("row")
    scales = {name: np.asarray(scale) for name, scale in by_row.scales().items()}
    _, values = started(WarmStart(scales, INITIAL, "file"), OWN)
    np.testing.assert_allclose(values["pooler.weight"][0], by_row.values["pooler.weight"])


@pytest.mark.parametrize(
    "granularity", [*ALONG_AXES, "row_column", "chunk", "partition", "singular"]
)
def test_the_same_granularity_starts_as_it_was_learned(granularity):
    source = learned(granularity)
    start = WarmStart(source.per_tensor(), INITIAL, "file", learned=source)
    _, values = started(start, granularity)
    found = {}
    for group, array in values.items():
        names = [group.replace("*", str(i)) for i in range(len(array))]
        found |= dict(zip(names, np.asarray(array), strict=True))
    assert found.keys() == source.values.keys()
    for group, array in source.values.items():
        np.testing.assert_array_equal(found[group], array)


@pytest.mark.parametrize("after", ["row_column", "chunk", "partition", "singular"])
def test_pieces_start_at_the_mean_of_their_tensor(after):
    source = learned("row")
    _, values = started(WarmStart(source.per_tensor(), INITIAL, "file", learned=source), after)
    pieces = values["layer.*.dense.weight"]
    assert pieces.shape[2] > 1
    for layer in range(2):
        expected = source.values[f"layer.{layer}.dense.weight"].mean(1, keepdims=True)
        np.testing.assert_allclose(pieces[layer], np.broadcast_to(expected, pieces[layer].shape))


def test_other_options_are_another_granularity():
    source = dataclasses.replace(learned("partition"), granularity_options={"groups": 4, "seed": 2})
    start = WarmStart(source.per_tensor(), INITIAL, "file", learned=source)
    _, values = started(start, "partition")
    mean = source.values["pooler.weight"].mean(1)
    np.testing.assert_allclose(values["pooler.weight"][0], np.tile(mean[:, None], 4), rtol=1e-6)


def test_what_is_not_known_starts_at_initial():
    scales = {
        "pooler.weight": np.array([[1.0], [np.nan]]).reshape(2, 1, 1),
        "layer.1.dense.weight": np.array([0.5, np.nan]),  # as another source may say it
    }
    _, values = started(WarmStart(scales, INITIAL, "file"), "row")
    np.testing.assert_allclose(values["pooler.weight"][0], np.repeat([[1.0], [INITIAL]], 4, 1))
    np.testing.assert_allclose(values["layer.*.dense.weight"][0], INITIAL)
    np.testing.assert_allclose(values["layer.*.dense.weight"][1, 0], 0.5)
    np.testing.assert_allclose(values["embed.weight"], INITIAL)


@pytest.mark.parametrize("after", ["task", "layer", "groups", "tensor", "row"])
def test_what_is_not_known_is_in_no_mean(after):
    """Of layers that were kept from the base a file says nothing."""
    known = {"layer.1.dense.weight": 0.5, "layer.1.dense.bias": 0.5, "pooler.weight": 0.9}
    scales = {name: np.array([value, np.nan]) for name, value in known.items()}
    _, values = started(WarmStart(scales, INITIAL, "file"), after)
    sizes = {"layer.1.dense.weight": 24, "layer.1.dense.bias": 4, "pooler.weight": 16}
    total = sum(sizes[name] * value for name, value in known.items()) / sum(sizes.values())
    expected = {
        "task": {"all": total},
        "layer": {"embed": INITIAL, "layer.0": INITIAL, "layer.1": 0.5, "pooler": 0.9},
        "groups": {"dense": (24 * 0.5 + 16 * 0.9) / 40, "first": INITIAL, "others": 0.5},
    }
    per_tensor = {"pooler.weight": 0.9, "embed.weight": INITIAL}
    for group, value in expected.get(after, per_tensor).items():
        np.testing.assert_allclose(values[group][0, 0], value, rtol=1e-6, err_msg=group)
    if after in ("tensor", "row"):
        for layer, value in enumerate([INITIAL, 0.5]):
            np.testing.assert_allclose(values["layer.*.dense.weight"][layer, 0], value)
    for group, own in values.items():
        np.testing.assert_allclose(own[:, 1], INITIAL, rtol=1e-6, err_msg=group)


def test_what_is_not_known_is_in_no_mean_of_a_granularity_of_ones_own():
    target = GRANULARITIES["task"](SHAPES)
    scales = {"pooler.weight": np.array([0.9, np.nan])}
    start = WarmStart(scales, INITIAL, "file")
    chosen = GranularityChoice("package.module:function", {})
    values = initial_values(start, target, chosen, CONSTRAINTS["free"], SHAPES, 2)
    np.testing.assert_allclose(values["all"], [[0.9, INITIAL]], rtol=1e-6)


def test_the_order_of_patterns_counts():
    source = learned("groups")
    patterns = OPTIONS["groups"]["patterns"]
    other = {"patterns": dict(reversed(patterns.items()))}
    assert other == OPTIONS["groups"]
    target = make_granularity("groups", other, SHAPES)
    scales = {name: np.asarray(scale) for name, scale in source.scales().items()}
    start = WarmStart(scales, INITIAL, "file", learned=source)
    values = initial_values(
        start, target, GranularityChoice("groups", other), CONSTRAINTS["free"], SHAPES, 2
    )
    # The first layer's matrix was in `dense`, and is now in `first` with its bias.
    first = (24 * source.values["dense"] + 4 * source.values["first"]) / 28
    np.testing.assert_allclose(values["first"][0], first, rtol=1e-5)
    assert not same_options(OPTIONS["groups"], other)


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("free", [-0.2, 1.4]),
        ("clip", [0, 1]),
        ("sigmoid", [1e-6, 1 - 1e-6]),
        ("softmax", [1e-6, 1]),
        ("simplex", [0, 1]),
        ("simplex_with_base", [0, 1]),
    ],
)
def test_a_start_is_moved_into_the_range_of_the_constraint(constraint, expected):
    scales = {name: np.array([-0.2, 1.4], np.float32) for name in TENSORS}
    _, values = started(WarmStart(scales, INITIAL, "file"), "tensor", constraint)
    for own in values.values():
        np.testing.assert_allclose(own, np.broadcast_to(expected, own.shape), atol=1e-6)


def models_of(fields, **tasks):
    return open_models(parse_recipe(fields | ({"tasks": tasks} if tasks else {})), Path("/"))


def from_file(coefficients, models, other_base=False):
    return start_from_file(
        coefficients, models, initial=INITIAL, other_base=other_base, source="file"
    )


def test_experts_are_matched_by_name(text_fields, tmp_path):
    tone, topic, mood = text_fields["tasks"].values()
    before = random_coefficients(models_of(text_fields, tone=tone, topic=topic), "row")
    newer = shutil.copytree(topic["expert"], tmp_path / "newer")
    edit_weights(newer, lambda tensors: tensors["classifier.bias"].__iadd__(1.0))
    tasks = {"mood": mood, "topic": topic | {"expert": str(newer)}}
    start = from_file(before, models_of(text_fields, **tasks))
    name = "bert.pooler.dense.weight"
    np.testing.assert_array_equal(start.scales[name][1, :, 0], before.values[name][1])
    assert np.isnan(start.scales[name][0]).all()
    experts, changed = start.notes
    assert "topic where they were learned; new, starting at 0.3: mood" in experts
    assert "no longer there: tone" in experts
    assert f"{newer} (sha256:" in changed
    assert "it keeps its coefficients" in changed
    renamed = from_file(before, models_of(text_fields, tone=tone, subject=topic))
    assert "subject ('topic' is that very model" in renamed.notes[0]
    with pytest.raises(InputError, match="experts are matched by name, and none has the same"):
        from_file(before, models_of(text_fields, mood=mood))


def test_rows_of_a_granularity_of_ones_own_are_carried_row_by_row(text_fields):
    models = models_of(text_fields)
    before = random_coefficients(models, OWN)
    start = from_file(before, models)
    for name in ("bert.pooler.dense.weight", QUERY.format(1)):
        np.testing.assert_array_equal(start.scales[name][..., 0], before.values[name])


def test_weights_of_a_mergekit_file(text_fields, tmp_path):
    models = [
        {"model": task["expert"], "parameters": {"weight": weight}}
        for task, weight in zip(
            text_fields["tasks"].values(),
            (0.1, 0.2, [{"filter": "pooler.dense.weight", "value": 0.7}, {"value": 0.4}]),
            strict=True,
        )
    ]
    file = tmp_path / "merge.yaml"
    config = {"merge_method": "task_arithmetic", "base_model": text_fields["base"]}
    config |= {"models": models, "parameters": {"normalize": False}, "dtype": "float32"}
    file.write_text(yaml.safe_dump(config))
    recipe = parse_recipe(text_fields | {"coefficients": {"start": str(file)}})
    opened = models_of(text_fields)
    start = open_warm_start(build(recipe, opened), opened, tmp_path)
    assert start.source == str(file) and start.learned is None
    for name, expected in (
        ("bert.pooler.dense.weight", [0.1, 0.2, 0.7]),
        ("bert.encoder.layer.1.output.dense.weight", [0.1, 0.2, 0.4]),
    ):
        np.testing.assert_allclose(start.scales[name], expected, rtol=1e-6)
    file.write_text("merge_method: slerp\n")
    with pytest.raises(InputError, match=r"coefficients.start: .*merge_method is 'slerp'"):
        open_warm_start(build(recipe, opened), opened, tmp_path)


def test_another_version_of_the_base(text_fields, tmp_path):
    before = random_coefficients(models_of(text_fields), "row")
    base = shutil.copytree(text_fields["base"], tmp_path / "base")
    edit_weights(base, lambda tensors: tensors["pooler.dense.bias"].__iadd__(0.1))
    models = models_of(text_fields | {"base": str(base)})
    with pytest.raises(InputError, match=r"learned for base = .*other_base: true starts") as caught:
        from_file(before, models)
    assert "another size" not in str(caught.value)
    start = from_file(before, models, other_base=True)
    assert start.learned is not None
    assert str(base) in start.notes[1]


def relatives(text_fields: dict[str, Any], root: Path, **sizes: int) -> dict[str, Any]:
    """A recipe with a BERT of other sizes, and experts of it."""
    sizes = BERT | sizes
    base = randomise(BertModel(BertConfig(**sizes)))
    base.save_pretrained(root / "base")
    for file in Path(text_fields["base"]).glob("*token*"):
        shutil.copy(file, root / "base")
    fields = copy.deepcopy(text_fields) | {"base": str(root / "base")}
    for seed, task in enumerate(fields["tasks"]):
        expert = BertForSequenceClassification(BertConfig(**sizes, num_labels=4))
        fine_tune(expert, base, seed).save_pretrained(root / task)
        fields["tasks"][task]["expert"] = str(root / task)
    return fields


@pytest.fixture(scope="module")
def smaller(text_fields, tmp_path_factory) -> dict[str, Any]:
    """A recipe with a BERT of half the layers and less than half the size, and experts of it."""
    root = tmp_path_factory.mktemp("smaller")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return relatives(text_fields, root, **sizes)


QUERY = "bert.encoder.layer.{}.attention.self.query.weight"


def test_a_deeper_base_of_the_same_width(text_fields, tmp_path):
    """It has all the tensors of the shallower one, and other layers at their relative depths."""
    before = random_coefficients(models_of(text_fields), "tensor")
    models = models_of(relatives(text_fields, tmp_path, num_hidden_layers=6))
    start = from_file(before, models, other_base=True)
    assert start.learned is None
    assert "carried over from a model of another size" in start.notes[-1]
    for here, there in enumerate([0, 1, 1, 2, 2, 3]):
        found = start.scales[QUERY.format(here)]
        np.testing.assert_array_equal(found, before.values[QUERY.format(there)])


def test_layers_that_are_not_mixed_count_in_the_depth(text_fields, smaller, tmp_path):
    before = random_coefficients(models_of(text_fields | {"keep_from_base": ["*.layer.3.*"]}))
    start = from_file(before, models_of(smaller), other_base=True)
    # Its last layer takes after the other's last one, of which nothing was learned.
    assert QUERY.format(0) in start.scales
    assert QUERY.format(1) not in start.scales
    base = shutil.copytree(text_fields["base"], tmp_path / "base")
    edit_weights(base, lambda tensors: tensors["pooler.dense.bias"].__iadd__(0.1))
    same_depth = models_of(text_fields | {"base": str(base)})
    assert from_file(before, same_depth, other_base=True).learned is not None


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_another_size_of_the_family(text_fields, smaller, granularity):
    before = random_coefficients(models_of(text_fields), granularity)
    models = models_of(smaller)
    with pytest.raises(InputError, match="of another size or family"):
        from_file(before, models)
    start = from_file(before, models, other_base=True)
    assert "they are a starting point and nothing more" in start.notes[-1]
    assert start.learned is None
    means = before.per_tensor()
    for here, there in ((0, 0), (1, 3)):
        found = start.scales[QUERY.format(here)]
        np.testing.assert_array_equal(found, means[QUERY.format(there)])
    assert start.scales.keys() == {name for name in models.base.names if "key.bias" not in name}
    with pytest.raises(InputError, match="and the base has none of these names"):
        other = dataclasses.replace(
            before,
            values={"x": before.values[min(before.values)]},
            shapes={"x": (96, 96)},
            granularity="tensor",
        )
        from_file(other, models, other_base=True)


def test_a_run_starts_from_a_file(text_recipe, tmp_path, capsys):
    tasks = text_recipe["tasks"]
    two = {task: tasks[task] for task in ("mood", "tone")}
    before = random_coefficients(models_of(text_recipe, **two), "row")
    before.save(tmp_path / "two.safetensors")
    recipe = write_recipe(tmp_path, text_recipe | {"coefficients": {"initial": 0.4}})
    options = ["--coefficients.start", "two.safetensors", "--learning.steps", "1"]
    cli.main(["learn", str(recipe), "--out", str(tmp_path / "run"), *options])
    printed = capsys.readouterr().out
    assert "starting from two.safetensors: tone, mood where they were learned" in printed
    assert "new, starting at 0.4: topic" in printed
    assert "tensor coefficients start at the mean of the row coefficients" in printed
    assert "are not from 0 to 1, as the constraint 'clip' asks" in printed
    found = Coefficients.load(tmp_path / "run" / "coefficients.safetensors")
    assert found.started_from == "two.safetensors"
    for name, mean in before.per_tensor().items():
        mood, tone = mean.clip(0, 1)
        # One step of Adam moves a coefficient by its learning rate at most.
        np.testing.assert_allclose(found.values[name], [tone, 0.4, mood], atol=0.0201)


def test_a_coarse_stage_starts_from_the_file_too(text_recipe, tmp_path):
    before = random_coefficients(models_of(text_recipe), "row")
    before.save(tmp_path / "rows.safetensors")
    coarse = {"granularity": "tensor", "steps": 1}
    chosen = {"start": "rows.safetensors", "granularity": "row", "coarse": coarse}
    recipe = parse_recipe(text_recipe | {"coefficients": chosen})
    inputs = learning_inputs(recipe, tmp_path)
    assert inputs.start.notes[1].startswith("tensor coefficients start at the mean")

    class SeenError(Exception):
        """What is called first, with the start: that is all there is to see."""

    def show(progress):
        raise SeenError(progress.best.values["bert.pooler.dense.weight"])

    with pytest.raises(SeenError) as caught:
        learn_coefficients(inputs, show_stage=lambda what, steps: nullcontext(show))
    mean = before.per_tensor()["bert.pooler.dense.weight"].clip(0, 1)
    np.testing.assert_allclose(caught.value.args[0][0], mean, rtol=1e-5)


def test_what_cannot_be_started_from(text_recipe, tmp_path):
    chosen = {"coefficients": {"start": "none.safetensors"}}
    recipe = parse_recipe(text_recipe | chosen)
    models = open_models(recipe, tmp_path)
    with pytest.raises(InputError, match=r"coefficients\.start: .*none\.safetensors: no such file"):
        open_warm_start(build(recipe, models), models, tmp_path)
    random_coefficients(models).save(tmp_path / "none.safetensors")
    changed = parse_recipe(text_recipe | chosen | {"interference": [{"name": "elect_sign"}]})
    notes = open_warm_start(build(changed, models), models, tmp_path).notes
    assert "other interference steps or options (none; now elect_sign)" in notes[1]
    assert notes[2] == "tensor coefficients start as they were learned"


def test_permission_without_a_start(text_recipe):
    with pytest.raises(InputError, match=r"other_base: there is no coefficients\.start"):
        parse_recipe(text_recipe | {"coefficients": {"other_base": True}})
