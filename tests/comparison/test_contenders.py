"""What a comparison measures: entries, their options, seeds and data."""

from typing import Any

import pytest

from adamerge_jax.comparison.contenders import choices_of, make_contenders
from adamerge_jax.errors import InputError
from adamerge_jax.methods import METHODS
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import Recipe

LABELLED = {"path": "labelled.jsonl", "label": "label"}
TASK = {"expert": "law", "calibration": "law.jsonl", "test": LABELLED, "validation": LABELLED}


def recipe_of(task: dict[str, Any] = TASK, **fields: Any) -> Recipe:
    kept_heads = {"preset": "adamerging"}
    return parse_recipe({"base": "base", "tasks": {"law": task}} | kept_heads | fields)


def without(part: str) -> dict[str, Any]:
    return {name: value for name, value in TASK.items() if name != part}


def test_methods_without_randomness_are_measured_once():
    contenders = make_contenders(recipe_of(seed=7), ["ties", "dare", "recipe"], [3, 4])
    measured = [(c.name, c.kind, c.seed) for c in contenders]
    assert measured == [
        ("ties", "merge", 3),
        ("dare", "merge", 3),
        ("dare", "merge", 4),
        ("recipe", "learning", 3),
        ("recipe", "learning", 4),
    ]
    assert [c.fields["seed"] for c in contenders] == [3, 3, 4, 3, 4]
    assert [c.options for c in contenders[1:3]] == [{"seed": 3}, {"seed": 4}]


def test_a_method_that_needs_data_is_measured_again_where_its_examples_are_drawn():
    limited = TASK | {"calibration": {"path": "law.jsonl", "limit": 5}}
    for recipe, seeds in (
        (recipe_of(), [3]),
        (recipe_of(learning={"examples": 5, "batch_size": 2}), [3, 4]),
        (recipe_of(limited), [3, 4]),
    ):
        contenders = make_contenders(recipe, ["regmean"], [3, 4])
        assert [c.seed for c in contenders] == seeds


def test_groups_stand_for_all_of_a_kind():
    chosen = [{"name": "ties", "options": {"density": 0.3}}]
    recipe = recipe_of(evaluation={"methods": chosen, "task_arithmetic": [0.2, 0.5]})
    names = [c.name for c in make_contenders(recipe, ["methods", "presets", "ties"], [0])]
    expected = [
        "task_arithmetic (coefficient 0.2 to 0.5, chosen with labels)"
        if name == "task_arithmetic"
        else name
        for name in METHODS
    ]
    assert names == [*expected, "ties (density 0.3)", *PRESETS]


def test_task_arithmetic_is_not_chosen_without_labels():
    recipe = recipe_of(without("validation"))
    contenders = make_contenders(recipe, ["methods"], [0])
    assert [c.options for c in contenders if c.method == "task_arithmetic"] == [{}]


def test_options_change_a_method_or_a_recipe():
    recipe = recipe_of(coefficients={"granularity": "chunk", "granularity_options": {"pieces": 4}})
    entries = [
        "{ties: {density: 0.3}}",
        "{recipe: {coefficients: {granularity: tensor}, learning: {steps: 5}}}",
        "{adamerging: {learning: {steps: 6}}}",
    ]
    ties, learned, preset = make_contenders(recipe, entries, [0])
    assert (ties.name, ties.options) == ("ties (density 0.3)", {"density": 0.3})
    assert learned.name == "recipe (coefficients.granularity tensor, learning.steps 5)"
    assert learned.fields["coefficients"]["granularity"] == "tensor"
    assert learned.fields["coefficients"]["granularity_options"] == {}
    assert learned.fields["learning"]["steps"] == 5
    assert preset.name == "adamerging (learning.steps 6)"
    assert preset.fields["learning"]["steps"] == 6


def test_a_preset_learns_as_it_is():
    """The recipe's own way to learn is left out, but for its examples and what is not merged."""
    recipe = recipe_of(
        keep_from_base=["*.bias"],
        interference=[{"name": "elect_sign"}],
        objectives=[{"name": "entropy", "weight": 2.0}],
        learning={"examples": 10, "steps": 3, "batch_size": 2},
    )
    fields = make_contenders(recipe, ["adamerging"], [0])[0].fields
    assert fields["interference"] == []
    assert fields["objectives"] == [{"name": "entropy", "weight": 1.0, "options": {}}]
    assert fields["learning"]["steps"] == PRESETS["adamerging"]["learning"]["steps"]
    assert (fields["learning"]["examples"], fields["learning"]["batch_size"]) == (10, 8)
    assert fields["keep_from_base"] == ["*.bias"]
    for other in (recipe, recipe_of(preset="recommended", learning={"examples": 10})):
        for preset in ("adamerging", "recommended"):
            learning = make_contenders(other, [preset], [0])[-1].fields["learning"]
            # A batch of examples of each task is left beside those that are held out.
            assert learning["batch_size"] + round(learning["held_out"] * 10) <= 10


def test_labels_come_from_the_validation_data():
    task = TASK | {"validation": LABELLED | {"limit": 5}}
    fields = make_contenders(recipe_of(task), ["atlas"], [0])[0].fields
    assert fields["tasks"]["law"]["calibration"]["limit"] == 5


def test_lists_are_choices():
    assert choices_of({"a": [1, 2], "b": [0.5, 1.5], "c": "x"}) == [
        {"a": 1, "b": 0.5, "c": "x"},
        {"a": 1, "b": 1.5, "c": "x"},
        {"a": 2, "b": 0.5, "c": "x"},
        {"a": 2, "b": 1.5, "c": "x"},
    ]
    assert choices_of({"patterns": ["*.weight", "*.bias"]}) == [
        {"patterns": ["*.weight", "*.bias"]}
    ]
    assert choices_of({}) == [{}]
    assert choices_of({"a": [0.3]}) == [{"a": 0.3}]


@pytest.mark.parametrize(
    ("task", "entries", "seeds", "message"),
    [
        (without("test"), ["ties"], [0], "tasks.law.test: is missing"),
        (TASK, ["tise"], [0], r"--methods: found 'tise'.*nearest is 'ties'"),
        (TASK, ["{ties: 0.3}"], [0], "--methods: found {ties: 0.3}; expected a name"),
        (TASK, ["{ties: {dense: 0.3}}"], [0], "its options are coefficient, density"),
        (TASK, ["{ties: {density: [0.3, 2]}}"], [0], "density is 2"),
        (TASK, ["{methods: {density: 0.3}}"], [0], "methods stands for many"),
        (TASK, ["{recipe: {lerning: {steps: 3}}}"], [0], "unknown field lerning"),
        (TASK, ["my_module:method"], [0], "--allow-code"),
        (TASK, ["ties"], [], "--seeds"),
        (TASK, ["ties"], [1, 1], "--seeds"),
        (without("validation"), ["atlas"], [0], "atlas learns from labels"),
        (without("validation"), ["{ties: {density: [0.1, 0.3]}}"], [0], "labelled validation data"),
    ],
)
def test_what_is_refused(task, entries, seeds, message):
    with pytest.raises(InputError, match=message):
        make_contenders(recipe_of(task), entries, seeds)


def named(recipe: Recipe, entries: list[str], *arguments: Any, **options: Any) -> list[str]:
    return [c.name for c in make_contenders(recipe, entries, [0], *arguments, **options)]


def test_merges_without_learning_get_the_heads_that_learning_gets():
    recipe = recipe_of(heads="learned")
    with_fits = ["base, heads refitted", "ties", "ties, heads refitted", "recipe"]
    assert named(recipe, ["ties", "recipe"]) == with_fits
    scaled = ["base, heads scaled", "ties", "ties, heads scaled", "recipe"]
    assert named(recipe, ["ties", "recipe"], fits=("scaled",)) == scaled
    assert named(recipe_of(heads="scaled"), ["ties", "recipe"]) == scaled
    assert named(recipe, ["ties", "recipe"], fits=()) == ["ties", "recipe"]
    assert named(recipe_of(), ["ties", "recipe"]) == ["ties", "recipe"]


def test_heads_are_a_dimension():
    recipe = recipe_of(heads={"kind": "learned", "ridge": 0.5})
    contenders = make_contenders(recipe, ["ties", "recipe"], [3, 4], ["kept", "learned"])
    assert [(c.name, c.seed) for c in contenders] == [
        ("ties", 3),
        ("recipe", 3),
        ("recipe", 4),
        ("recipe, heads learned", 3),
        ("recipe, heads learned", 4),
    ]
    assert contenders[1].fields["heads"]["kind"] == "kept"
    assert contenders[3].fields["heads"]["ridge"] == 0.5
    fitted = make_contenders(recipe, ["ties"], [3, 4], ["refitted"])
    assert [(c.name, c.seed) for c in fitted] == [
        ("base, heads refitted", 3),
        ("base, heads refitted", 4),
        ("ties, heads refitted", 3),
        ("ties, heads refitted", 4),
    ]


@pytest.mark.parametrize(
    ("kind", "fits", "message"),
    [
        ("learned", ("scaled",), "learned is not for these models.* kept or scaled$"),
        ("refitted", (), "refitted is not for these models.* can be kept$"),
    ],
)
def test_heads_that_models_do_not_have(kind, fits, message):
    with pytest.raises(InputError, match=message):
        make_contenders(recipe_of(), ["ties"], [0], [kind], fits=fits)


def test_a_preset_has_its_own_heads_unless_the_recipe_chooses():
    (contender,) = make_contenders(recipe_of(), ["adamerging"], [0])
    assert contender.fields["heads"]["kind"] == "kept"
    chosen = make_contenders(recipe_of(heads="refitted"), ["adamerging"], [0])
    assert chosen[-1].fields["heads"]["kind"] == "refitted"
