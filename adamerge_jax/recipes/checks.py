"""The checks that types cannot express: fields that do not go together, unknown choices.

No checkpoint and no data is opened. Each function checks one section, in the order of the fields.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from adamerge_jax.checkpoints.dtypes import INTEGERS
from adamerge_jax.checkpoints.folders import require_run_name, require_task_name
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import GRANULARITIES, make_granularity
from adamerge_jax.coefficients.importance import FROM_COARSE
from adamerge_jax.errors import InputError
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.methods import make_method
from adamerge_jax.recipes.build import (
    build_interference,
    build_objectives,
    build_regularizers,
)
from adamerge_jax.recipes.schema import (
    CoefficientsRecipe,
    DevicesRecipe,
    FrontRecipe,
    InterferenceRecipe,
    LearningRecipe,
    MethodRecipe,
    ObjectiveRecipe,
    OptimizerRecipe,
    Recipe,
    RegularizerRecipe,
    SearchRecipe,
    TaskRecipe,
    TaskVectorsRecipe,
)
from adamerge_jax.registry import find_registered, is_own_code

_FARTHEST = 1e3
"""The largest size of a coefficient that is searched for."""

C = TypeVar("C", InterferenceRecipe, MethodRecipe, ObjectiveRecipe, RegularizerRecipe)


def check(recipe: Recipe) -> None:
    """Refuses fields that do not go together, unknown names and unknown options.

    Functions of somebody's own are looked at when the method is built, and so may run.

    Raises:
        InputError: The field is refused; the message says what to change.
    """
    require_run_name(recipe.name)
    _check_tasks(recipe.tasks)
    _check_devices(recipe.devices)
    _check_initial(recipe.coefficients, recipe.initial_coefficient, len(recipe.tasks))
    _check_weights(recipe.objectives, recipe.tasks)
    _check_control(recipe.learning, recipe.forgotten, recipe.tasks)
    _check_coefficients(recipe.coefficients, recipe.task_vectors)
    _check_bounds(recipe.search, recipe.front)
    _check_without_experts(recipe)
    build_optimizer(recipe.learning.optimizer, recipe.learning.steps)
    _check_own_optimizer(recipe.learning.optimizer, recipe.coefficients.constraint)
    build_regularizers(_of_package(recipe.regularizers))
    initial_merge = recipe.coefficients.initial_merge
    methods = [*recipe.evaluation.methods, *([initial_merge] if initial_merge else [])]
    for method in _of_package(methods):
        make_method(method.name, method.options)
    build_interference(_of_package(recipe.interference), recipe.seed)
    objectives = build_objectives(_of_package(recipe.objectives), recipe.tasks).values()
    if recipe.learning.microbatches > 1 and any(o.target_spec.whole_batch for o in objectives):
        raise InputError(
            "learning.microbatches: pseudo_labels, expert_labels, contrastive, and "
            "hidden_state_alignment with relative, look at the whole batch; set it to 1, "
            "or choose another objective"
        )


def _of_package(choices: Sequence[C]) -> list[C]:
    """Returns the choices that are the package's own functions."""
    return [choice for choice in choices if not is_own_code(choice.name)]


def _check_tasks(tasks: Mapping[str, TaskRecipe]) -> None:
    for task, fields in tasks.items():
        require_task_name(task)
        (part, end), *others = fields.named_ends.items() or [("", "")]
        for other, other_end in others:
            if other_end != end:
                raise InputError(
                    f"tasks.{task}: {part}.end_of_text is {end}, {other}.end_of_text is "
                    f"{other_end}; what is learned from must be what is tested: give both the same"
                )
    if "base" in tasks:
        raise InputError("tasks: no task can be called 'base'; rename it")


def _check_devices(devices: DevicesRecipe) -> None:
    for field in ("coordinator", "processes", "process"):
        if getattr(devices, field) is not None and not devices.distributed:
            raise InputError(
                f"devices.{field}: is for several processes; set devices.distributed, or leave "
                "it out"
            )


def _check_initial(coefficients: CoefficientsRecipe, initial: float, experts: int) -> None:
    constraint = CONSTRAINTS[coefficients.constraint]
    if not constraint.allows(np.full(experts, initial)):
        default = " (the default with initial_merge)" if coefficients.initial is None else ""
        raise InputError(
            f"coefficients.initial: {initial:g}{default} is not {constraint.range}, "
            f"as the constraint {coefficients.constraint!r} asks; change one of the two"
        )
    if coefficients.other_base and coefficients.start is None:
        raise InputError(
            "coefficients.other_base: there is no coefficients.start that it allows; give one, "
            "or leave it out"
        )


def _check_weights(objectives: Sequence[ObjectiveRecipe], tasks: Mapping[str, object]) -> None:
    for position, term in enumerate(objectives):
        unknown = set(term.weight) - set(tasks) if isinstance(term.weight, dict) else ()
        if unknown:
            raise InputError(
                f"objectives.{position}.weight: {min(unknown)!r} is no task; "
                f"the tasks are {', '.join(tasks)}"
            )
    if not any(term.weight_of(task) for term in objectives for task in tasks):
        raise InputError("objectives: every weight is 0, so that nothing would be learned")


def _check_control(
    learning: LearningRecipe, forgotten: Sequence[str], tasks: Mapping[str, object]
) -> None:
    if learning.control is not None and not forgotten:
        raise InputError(
            "learning.control: nothing is to be forgotten; give the objective of a task a "
            "weight below 0, or leave it out"
        )
    if learning.control is not None and len(forgotten) == len(tasks):
        raise InputError("learning.control: every task is to be forgotten, none is left to control")
    if learning.batch_size % learning.microbatches:
        raise InputError(
            f"learning.microbatches: {learning.microbatches} equal parts cannot be made of "
            f"learning.batch_size {learning.batch_size}; change one of the two"
        )


def _check_bounds(search: SearchRecipe, front: FrontRecipe) -> None:
    for section, (low, high) in (("search", search.bounds), ("front", front.bounds)):
        if low >= high or max(-low, high) > _FARTHEST:
            raise InputError(
                f"{section}.bounds: found {low:g} to {high:g}, expected the smallest coefficient, "
                f"then a larger one, both from -{_FARTHEST:g} to {_FARTHEST:g}"
            )


def _check_without_experts(recipe: Recipe) -> None:
    if not recipe.evaluation.without_experts:
        return
    if recipe.coefficients.initial_merge is not None:
        raise InputError(
            "evaluation.without_experts: coefficients.initial_merge holds all experts, whatever "
            "the coefficients are; leave one of the two out"
        )
    if lacking := [task for task, fields in recipe.tasks.items() if fields.test is None]:
        raise InputError(
            f"evaluation.without_experts: scores are those of test data, and tasks.{lacking[0]} "
            "has none; give it some, or leave this out"
        )


def _check_own_optimizer(optimizer: OptimizerRecipe, constraint: str) -> None:
    """Refuses an optimizer of this package with coefficients that it is not for."""
    if optimizer.name == "concrete" and constraint != "concrete":
        raise InputError(
            f"coefficients.constraint: found {constraint!r}; the optimizer concrete learns the "
            "mask of the constraint concrete: take that"
        )
    if optimizer.name != "frank_wolfe":
        return
    base = optimizer.options.get("base", True)
    expected = "simplex_with_base" if base else "simplex"
    if constraint != expected:
        raise InputError(
            f"coefficients.constraint: found {constraint!r}; frank_wolfe steps from average to "
            f"average: take {expected}" + (", or simplex with base: false in its options" * base)
        )
    if optimizer.learning_rate > 1:
        raise InputError(
            f"learning.optimizer.learning_rate: frank_wolfe goes {optimizer.learning_rate:g} of "
            "the way to a model; give at most 1"
        )
    if optimizer.clip_norm is not None:
        raise InputError(
            "learning.optimizer.clip_norm: frank_wolfe looks at the gradient's direction alone; "
            "leave it out"
        )


def _check_coefficients(coefficients: CoefficientsRecipe, task_vectors: TaskVectorsRecipe) -> None:
    name, options = coefficients.granularity, coefficients.granularity_options
    from_coarse = FROM_COARSE.get(name)
    takes_rows_apart = False
    if from_coarse is not None:
        if coefficients.coarse is None:
            raise InputError(
                f"coefficients.coarse: is missing; {name} scores tensors by coefficients that are "
                "learned first"
            )
        from_coarse.require_options(options)
        takes_rows_apart = True
    elif name == "auto":
        if options:
            raise InputError(
                "coefficients.granularity_options: auto takes none; name the granularity"
            )
    elif not is_own_code(name):
        find_registered("coefficients.granularity", GRANULARITIES, name)
        # Without parameters only options are looked at; those of heads may be left to the model.
        if options or name != "head":
            takes_rows_apart = make_granularity(name, options, {}).cuts_rows
    if task_vectors.dtype == "int4" and task_vectors.memory != "device":
        raise InputError(
            f"task_vectors.memory: is {task_vectors.memory}, and two int4 share a byte on the "
            "device only; take device, or int8"
        )
    if task_vectors.dtype in INTEGERS and takes_rows_apart:
        raise InputError(
            f"task_vectors.dtype: {task_vectors.dtype} has a step for each row, and the "
            f"granularity {name!r} takes rows apart; take row, column, row_column, head, tensor "
            "or a coarser one, or bfloat16 task vectors"
        )
