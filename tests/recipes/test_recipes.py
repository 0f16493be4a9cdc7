from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.recipes.build import build_objectives
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import OptimizerRecipe
from tests.references import write_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "experiments" / "recipes").glob("*.yaml"))


def fields(**changes: Any) -> dict[str, Any]:
    task = {"expert": "experts/a", "calibration": "a.jsonl"}
    return {"base": "base", "tasks": {"a": task, "b": task | {"expert": "experts/b"}}} | changes


def task(**changes: Any) -> dict[str, Any]:
    return {"expert": "e", "calibration": "c.jsonl"} | changes


def refused(match: str, **changes: Any) -> None:
    """Parsing raises an InputError of one line that says `match`."""
    with pytest.raises(InputError, match=match) as caught:
        parse_recipe(fields(**changes))
    assert "\n" not in str(caught.value)


def test_no_options_for_a_granularity_that_is_chosen_later():
    options = {"granularity": "auto", "granularity_options": {"tables": True}}
    refused("granularity_options: auto takes none", coefficients=options)


def test_defaults():
    recipe = parse_recipe(fields())
    assert recipe.base.path == "base"
    assert recipe.tasks["b"].expert.path == "experts/b"
    assert recipe.tasks["a"].calibration.path == "a.jsonl"
    assert recipe.preset == "recommended"
    assert recipe.coefficients.granularity == PRESETS["recommended"]["coefficients"]["granularity"]
    assert parse_recipe(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("constraint", "initial"),
    [("softmax", 1 / 2), ("simplex", 1 / 2), ("simplex_with_base", 1 / 3), ("positions", 1 / 3)],
)
def test_averages_start_in_the_middle(constraint, initial):
    recipe = parse_recipe(fields(coefficients={"constraint": constraint, "initial": None}))
    assert recipe.initial_coefficient == initial


def test_paths_may_be_sections():
    source = {"path": "org/base", "revision": "v1"}
    data = {"path": "org/data", "split": "test", "text": ["a", "b"]}
    recipe = parse_recipe(fields(base=source, tasks={"a": task(test=data)}))
    assert (recipe.base.path, recipe.base.revision) == ("org/base", "v1")
    assert recipe.tasks["a"].test.text == ("a", "b")
    assert parse_recipe(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("changes", "unknown", "nearest"),
    [
        ({"taks": {}}, "taks", "tasks"),
        ({"coefficients": {"granularty": "task"}}, "coefficients.granularty", "granularity"),
        (
            {"learning": {"optimizer": {"lerning_rate": 1}}},
            "learning.optimizer.lerning_rate",
            "learning_rate",
        ),
        ({"objectives": [{"name": "entropy", "wieght": 1}]}, "objectives.0.wieght", "weight"),
        ({"tasks": {"a": task(exprt="e")}}, "tasks.a.exprt", "expert"),
        ({"tasks": {"a": task(test={"path": "x", "lable": "y"})}}, "tasks.a.test.lable", "label"),
        # Tasks that are called like fields.
        ({"tasks": {"test": task(calibrations="x")}}, "tasks.test.calibrations", "calibration"),
        ({"tasks": {"expert": task(tests="x")}}, "tasks.expert.tests", "test"),
        ({"base": {"path": "b", "revison": "v1"}}, "base.revison", "revision"),
    ],
)
def test_unknown_fields(changes, unknown, nearest):
    refused(f"unknown field {unknown}; nearest valid name is '{nearest}'", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a": {"calibration": "c"}}}, r"field tasks\.a\.expert is missing"),
        ({"tasks": {"a": task(test={"label": "y"})}}, r"field tasks\.a\.test\.path is missing"),
        ({"tasks": {}}, "field tasks: found {};.*at least 1"),
        ({"tasks": ["a"]}, r"field tasks: found \['a'\];.*dictionary"),
        ({"tasks": {"a/b": task()}}, "task name 'a/b' cannot be the name of a folder"),
        ({"tasks": {"": task()}}, "task name '' cannot be the name of a folder"),
        ({"tasks": {"base": task()}}, "no task can be called 'base'"),
        ({"learning": {"steps": "many"}}, "field learning.steps: found 'many';.*integer"),
        ({"learning": {"steps": 0}}, "field learning.steps: found 0;"),
        ({"learning": {"held_out": 1.0}}, "field learning.held_out: found 1.0;"),
        ({"coefficients": {"granularity": "atom"}}, "found 'atom'; expected one of task, layer, "),
        ({"preset": "adamergin"}, "preset: found 'adamergin'; expected one of adamerging"),
        ({"objectives": []}, r"field objectives: found \[\];"),
        ({"objectives": [{"name": "entropie"}]}, "found 'entropie';.*nearest is 'entropy'"),
        ({"export": {"dtype": "int8"}}, "field export.dtype: found 'int8'"),
        ({"seed": -1}, "field seed: found -1"),
        ({"seed": 1.5, "max_length": 1}, r"field max_length: found 1;.*; field seed: found 1.5;"),
        ({"keep_from_base": "x"}, "field keep_from_base: found 'x';.*list"),
    ],
)
def test_wrong_fields(changes, message):
    refused(message, **changes)


FRANK_WOLFE = {"name": "frank_wolfe"}


@pytest.mark.parametrize(
    ("constraint", "optimizer", "message"),
    [
        ("clip", FRANK_WOLFE, "constraint: found 'clip'; .* take simplex_with_base, or simplex"),
        ("simplex", FRANK_WOLFE, "constraint: found 'simplex'; .* take simplex_with_base"),
        (
            "simplex_with_base",
            FRANK_WOLFE | {"options": {"base": False}},
            "constraint: found 'simplex_with_base'; .* take simplex$",
        ),
        (
            "simplex_with_base",
            FRANK_WOLFE | {"options": {"base": "no"}},
            "options: base is 'no', expected true or false",
        ),
        (
            "simplex_with_base",
            FRANK_WOLFE | {"learning_rate": 1.5},
            "learning_rate: frank_wolfe goes 1.5 of the way .* at most 1",
        ),
        ("simplex_with_base", FRANK_WOLFE | {"clip_norm": 1.0}, "clip_norm: .* leave it out"),
    ],
)
def test_frank_wolfe_steps_between_models(constraint, optimizer, message):
    coefficients = {"constraint": constraint, "initial": None}
    refused(message, coefficients=coefficients, learning={"optimizer": optimizer})


@pytest.mark.parametrize(
    ("constraint", "initial", "allowed"),
    [
        ("clip", 1.2, "from 0 to 1"),
        ("sigmoid", 0.0, "between 0 and 1, both excluded"),
        ("softmax", 0.3, "summing to 1"),
        ("simplex", 0.3, "summing to 1"),
        ("simplex_with_base", 0.6, "summing to at most 1"),
        ("positions", -0.1, "at least 0"),
    ],
)
def test_a_start_outside_of_the_constraint(constraint, initial, allowed):
    coefficients = {"constraint": constraint, "initial": initial}
    refused(
        f"coefficients.initial: .* is not .*{allowed}.*'{constraint}'", coefficients=coefficients
    )
    parse_recipe(fields(coefficients={"constraint": "free", "initial": 1.2}))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "adamm"}, r"optimizer.name: optax has no 'adamm'; did you mean 'adam'\?"),
        ({"name": "softmax_cross_entropy"}, "optimizer.name"),
        ({"name": "__loader__"}, "optax has no '__loader__'"),
        ({"name": "sgd", "options": {"b1": 0.9}}, "optax.sgd says: .*b1"),
        ({"schedule": "cosine"}, "optimizer.schedule: optax has no 'cosine'; did you mean"),
        ({"schedule": "linear_schedule"}, "linear_schedule says: .*end_value"),
        ({"learning_rate": 0}, "field learning.optimizer.learning_rate: found 0"),
    ],
)
def test_unusable_optimizers(optimizer, message):
    refused(message, learning={"optimizer": optimizer})


def updates(optimizer: OptimizerRecipe, gradients: list[float]) -> list[float]:
    transformation = build_optimizer(optimizer, steps=10)
    raw = jnp.zeros(())
    state = transformation.init(raw)
    taken = []
    for gradient in gradients:
        update, state = transformation.update(jnp.asarray(gradient), state, raw)
        taken.append(float(update))
    return taken


def test_options_of_an_optimizer_may_be_what_yaml_cannot_say():
    optimizer = {"options": {"mu_dtype": jnp.bfloat16}}
    chosen = parse_recipe(fields(learning={"optimizer": optimizer})).learning.optimizer
    moments = build_optimizer(chosen, 10).init(jnp.zeros(3))
    assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(moments)}


def test_optimizers_are_those_of_optax():
    sgd = OptimizerRecipe(name="sgd", learning_rate=0.5)
    np.testing.assert_allclose(updates(sgd, [1.0, -4.0]), [-0.5, 2.0])
    clipped = OptimizerRecipe(name="sgd", learning_rate=0.5, clip_norm=2.0)
    np.testing.assert_allclose(updates(clipped, [1.0, -4.0]), [-0.5, 1.0])
    adam = OptimizerRecipe(options={"b1": 0.5})
    reference = optax.adam(1e-3, b1=0.5)
    state = reference.init(jnp.zeros(()))
    for taken, gradient in zip(updates(adam, [1.0, 3.0]), [1.0, 3.0], strict=True):
        update, state = reference.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(taken, update)


def test_schedules_start_at_the_learning_rate():
    options = {"transition_steps": 2, "end_value": 0.0}
    recipe = parse_recipe(
        fields(
            learning={
                "optimizer": {
                    "name": "sgd",
                    "learning_rate": 1.0,
                    "schedule": "linear_schedule",
                    "schedule_options": options,
                }
            }
        )
    )
    taken = updates(recipe.learning.optimizer, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(taken, [-1.0, -0.5, 0.0])


def test_schedules_last_as_long_as_learning():
    optimizer = {"name": "sgd", "learning_rate": 1.0, "schedule": "cosine_decay_schedule"}
    recipe = parse_recipe(fields(learning={"steps": 10, "optimizer": optimizer}))
    taken = updates(recipe.learning.optimizer, [1.0] * 11)
    np.testing.assert_allclose(taken[5], -0.5, atol=1e-6)
    np.testing.assert_allclose(taken[10], 0.0, atol=1e-6)


def test_weights_by_task():
    terms = [
        {"name": "cross_entropy", "weight": {"a": -1}},
        {"name": "logit_alignment", "weight": {"b": 2.0}},
    ]
    labelled = task(calibration={"path": "c", "label": "y"})
    recipe = parse_recipe(
        fields(objectives=terms, tasks={"a": labelled, "b": task()}, learning={"control": 0.9})
    )
    assert recipe.forgotten == ["a"]
    objectives = build_objectives(recipe.objectives, recipe.tasks)
    assert objectives["a"].target_spec.labels and not objectives["a"].target_spec.expert
    assert objectives["b"].target_spec.expert_logits and not objectives["b"].target_spec.labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": [{"name": "entropy", "weight": {"c": 1}}]},
            r"objectives\.0\.weight: 'c' is no task; the tasks are a, b",
        ),
        (
            {"objectives": [{"name": "entropy", "options": {"temperature": 2}}]},
            "entropy says: .*temperature.*; its options are none",
        ),
        (
            {"objectives": [{"name": "logit_alignment", "options": {"form": "sharp"}}]},
            "form is 'sharp', expected 'soft', 'kl' or 'hard'",
        ),
        ({"learning": {"control": 0.9}}, "learning.control: nothing is to be forgotten"),
        (
            {"objectives": [{"name": "entropy", "weight": -1}], "learning": {"control": 0.9}},
            "learning.control: every task is to be forgotten",
        ),
        (
            {"coefficients": {"granularity": "importance_chunk"}},
            "coefficients.coarse: is missing; importance_chunk",
        ),
        (
            {"coefficients": {"granularity": "importance_chunk", "coarse": {"steps": 3}}},
            "granularity_options: importance_chunk takes one option, budget",
        ),
        *(
            (
                {
                    "coefficients": {
                        "granularity": "importance_chunk",
                        "granularity_options": {"budget": found},
                        "coarse": {"steps": 3},
                    }
                },
                "granularity_options.budget is .*, expected a whole number, at least 1$",
            )
            for found in ("lots", 2000.0, 0, None)
        ),
        *(
            ({"coefficients": {"granularity": name, "granularity_options": options}}, message)
            for name, options, message in [
                ("tensor", {"pieces": 4}, "tensor says: .*'pieces'; its options are none"),
                ("groups", {"patterns": ["*.attention.*"]}, "groups says: patterns is "),
                ("head", {"heads": 2}, "head says: heads is 2, expected axis and number"),
                ("chunk", {"pieces": 2.5}, "chunk says: pieces is 2.5, expected a whole number"),
                ("partition", {"groups": "4"}, "partition says: groups is '4', expected a whole"),
                ("singular", {"rank": 1.5}, "singular says: rank is 1.5, expected a whole number"),
                ("row", {"tables": 3}, "row says: tables is 3, expected true or false"),
            ]
        ),
        (
            {"coefficients": {"granularity": "no.such:thing"}},
            "granularity: 'no.such:thing' is code of somebody's own, .*--allow-code",
        ),
        ({"regularizers": [{"name": "l2"}]}, "regularizers: found 'l2'; expected one of distance"),
        (
            {"regularizers": [{"name": "distance", "options": {"p": 0}}]},
            "p is 0, expected at least",
        ),
        ({"interference": [{"name": "ties"}]}, "interference: found 'ties'; expected one of trim"),
        (
            {"interference": [{"name": "trim", "options": {"density": 2}}]},
            "density is 2, expected over 0 and up to 1",
        ),
    ],
)
def test_combinations_that_make_no_sense(changes, message):
    refused(message, **changes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groups", {"patterns": {"attention": ["*.attention.*"]}}),
        ("head", {}),
        ("head", {"heads": {"*.query.*": [0, 12]}}),
        ("chunk", {"pieces": {"*.query.*": 4}, "tables": True}),
        ("partition", {"groups": 4}),
    ],
)
def test_options_of_granularities_need_no_model(name, options):
    coefficients = {"granularity": name, "granularity_options": options}
    assert parse_recipe(fields(coefficients=coefficients)).coefficients.granularity == name


def test_files(tmp_path):
    assert load_recipe(write_recipe(tmp_path, fields())).name == "recipe"
    assert load_recipe(str(tmp_path / "recipe.yaml")).name == "recipe"
    assert load_recipe(write_recipe(tmp_path, fields(name="mine"))).name == "mine"


def test_changed_fields_leave_the_others_of_the_file(tmp_path):
    chunks = {"granularity": "chunk", "granularity_options": {"pieces": 4}, "initial": 0.2}
    learning = {"steps": 7, "optimizer": {"learning_rate": 0.5}}
    file = write_recipe(tmp_path, fields(coefficients=chunks, learning=learning))
    one = {"a": fields()["tasks"]["a"]}
    changes = {
        "tasks": one,
        "coefficients": {"granularity": "row"},
        "learning": {"optimizer": {"name": "sgd"}},
        "heads": "kept",
    }
    recipe = load_recipe(file, changes=changes)
    assert [*recipe.tasks] == ["a"]
    assert (recipe.coefficients.granularity, recipe.coefficients.granularity_options) == ("row", {})
    assert (recipe.learning.steps, recipe.coefficients.initial) == (7, 0.2)
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate, recipe.heads.kind) == ("sgd", 0.5, "kept")
    assert load_recipe(file, changes={"seed": 1}).coefficients.granularity_options == {"pieces": 4}


def test_numbers_in_files(tmp_path):
    file = write_recipe(tmp_path, fields())
    optimizer = "{learning_rate: 1e-2, options: {eps: 1e-6, b1: .5e0}}"
    file.write_text(file.read_text() + f"learning: {{optimizer: {optimizer}}}\nname: 1e-2b\n")
    recipe = load_recipe(file)
    assert recipe.learning.optimizer.learning_rate == 0.01
    assert recipe.learning.optimizer.options == {"eps": 1e-6, "b1": 0.5}
    assert recipe.name == "1e-2b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "not valid YAML"),
        ("base: x\n  tasks: y", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("", "expected fields such as base and tasks, found None"),
        ("- base", r"expected fields .* found \['base'\]"),
        ("base: b\n", "field tasks is missing"),
    ],
)
def test_unusable_files(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_load(file):
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert len(recipe.tasks) >= 2
    assert recipe.learning.optimizer.name == "adam"


def test_recipes_are_shipped():
    assert {"text6", "clip_vit_b32_8tasks"} <= {file.stem for file in SHIPPED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning": {"steps": True}}, "learning.steps: found True, expected a number"),
        ({"learning": {"optimizer": {"learning_rate": 1e-50}}}, "a number that float32 has"),
        ({"learning": {"optimizer": {"options": {"b1": "5"}}}}, "b1 is '5', expected a number"),
        ({"learning": {"optimizer": {"options": {"b1": None}}}}, "b1 is None, expected a number"),
        ({"learning": {"optimizer": {"options": {"b2": 1.5}}}}, "b2 is 1.5, expected from 0"),
        ({"learning": {"optimizer": {"options": {"eps": -1.0}}}}, "eps is -1.0, expected at least"),
        ({"coefficients": {"initial": True}}, "coefficients.initial: found True"),
        ({"objectives": [{"name": "entropy", "weight": 1e30}]}, "found 1e.30; Input should be"),
        ({"objectives": [{"name": "entropy", "weight": {"law": True}}]}, "found True"),
        ({"regularizers": [{"name": "distance", "weight": -1e9}]}, "found -1000000000.0"),
        ({"evaluation": {"task_arithmetic": [1e30]}}, "task_arithmetic.0: found 1e.30"),
        *(
            (
                {"objectives": [{"name": "logit_alignment", "options": {option: value}}]},
                f"{option} is .*, expected",
            )
            for option, values in {
                "temperature": (True, "5", None, 1e30),
                "top_tokens": (5.5, True, 10**20),
                "cross_task": (1e30, [1]),
            }.items()
            for value in values
        ),
        *(
            (
                {
                    "evaluation": {
                        "methods": [{"name": "task_arithmetic", "options": {"coefficient": value}}]
                    }
                },
                "coefficient is .*, expected",
            )
            for value in (None, "5", [1], {"a": 1}, True, 1e30)
        ),
        (
            {"interference": [{"name": "drop_and_rescale", "options": {"seed": 1.5}}]},
            "seed is 1.5, expected a whole number",
        ),
        ({"name": " law"}, "cannot be the name of a folder"),
    ],
)
def test_wild_numbers(changes, message):
    refused(message, **changes)
