"""What the command line runs: from a recipe to a run folder, from coefficients to a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Array
from rich.console import Console
from transformers import AutoImageProcessor, AutoTokenizer

from adamerge_jax import learning, report
from adamerge_jax.baselines import average, task_arithmetic
from adamerge_jax.calibration import Calibration, calibrate
from adamerge_jax.checkpoints.folders import require_new
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import require_same_architecture
from adamerge_jax.coefficients import (
    CONSTRAINTS,
    GRANULARITIES,
    Coefficients,
    Granularity,
    Values,
    unstack_values,
)
from adamerge_jax.data import Examples, load_examples
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation import Evaluator, Row
from adamerge_jax.exporting import export, export_bytes
from adamerge_jax.loading import (
    DTYPES,
    Models,
    load_head,
    load_task_vectors,
    load_trunk,
    load_zero_shot_head,
    match_trunk,
    open_models,
)
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models import Network
from adamerge_jax.objectives import OBJECTIVES, weighted_sum
from adamerge_jax.progress import show_progress
from adamerge_jax.recipes import Recipe, TaskRecipe

COEFFICIENTS_FILE = "coefficients.safetensors"
HEAT_MAP_FILE = "coefficients.png"
PLAIN_TASK_ARITHMETIC = 0.3
"""Task arithmetic's coefficient where there is no labelled data to choose it with."""


class Run(NamedTuple):
    """What a finished run leaves.

    Attributes:
        folder: The run folder.
        coefficients: The learned coefficients.
        rows: The table of results, the learned merge last; empty without test data.
    """

    folder: Path
    coefficients: Coefficients
    rows: list[Row]


def learn(recipe: Recipe, *, root: Path, out: Path, console: Console) -> Run:
    """Learns coefficients, compares the merge with its baselines and exports it.

    Args:
        recipe: What to merge and how.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked.
        console: Where progress and results are printed.

    Raises:
        InputError: Something in the recipe, the checkpoints or the data cannot be used.
        NonFiniteObjectiveError: Learning diverged; the run folder holds the last good
            coefficients.
    """
    require_new(out)
    with console.status("opening checkpoints and data"):
        models = open_models(recipe, root)
        # The Hugging Face checkpoint and the Orbax checkpoint.
        require_new(out, expected_bytes=2 * export_bytes(models, recipe))
        data = _load_data(recipe, models, root)
        calibration = calibrate(
            data.calibration,
            batch_size=recipe.learning.batch_size,
            held_out=recipe.learning.held_out,
            seed=recipe.seed,
        )
    with console.status("reading task vectors"):
        dtype = DTYPES[recipe.dtype] if recipe.dtype else None
        heads = _load_heads(recipe, models, data, dtype)
        _require_labels_in_range(models, heads, data)
        base = load_trunk(models, models.base, dtype)
        deltas, mixed = load_task_vectors(models, dtype)
    if not deltas:
        raise InputError("no expert differs from the base in any parameter that is merged")

    granularity = GRANULARITIES[recipe.coefficients.granularity](
        {name: models.shapes[name] for name in deltas}
    )
    initial = granularity.init(len(models.experts), recipe.initial_coefficient)
    console.print(_summary(recipe, models, mixed, initial, calibration))
    trunk = models.family.build_trunk(models.config, recipe.learning.rematerialize)
    head_networks = _head_networks(models)
    evaluator = Evaluator(trunk, head_networks, heads, recipe.evaluation.batch_size)
    objective = weighted_sum([(term.weight, OBJECTIVES[term.name]) for term in recipe.objectives])
    if objective.needs_expert:
        with console.status("asking the experts"):
            calibration = calibration._replace(
                expert_logits={
                    task: evaluator.logits(load_trunk(models, expert, dtype), task, examples)
                    for (task, examples), expert in zip(
                        data.calibration.items(), models.experts.values(), strict=True
                    )
                }
            )
    learner = learning.make_learner(
        learning.forward_with_heads(trunk, list(head_networks.values())),
        granularity,
        CONSTRAINTS[recipe.coefficients.constraint],
        objective,
        recipe.learning.optimizer.build(),
    )
    frozen = learning.Frozen(base, deltas, list(heads.values()))

    def keep(learned: learning.Learned) -> Coefficients:
        coefficients = _describe(recipe, models, mixed, learned)
        coefficients.save(out / COEFFICIENTS_FILE)
        return coefficients

    out.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (out / "recipe.yaml").write_text(resolved)
    try:
        with show_progress(
            list(recipe.tasks), recipe.learning.steps, out / "metrics.jsonl", console
        ) as show:
            learned = learning.learn(
                learner,
                frozen,
                initial,
                calibration,
                steps=recipe.learning.steps,
                evaluate_every=recipe.learning.evaluate_every
                or max(1, recipe.learning.steps // 10),
                report=show,
            )
    except learning.NonFiniteObjectiveError as error:
        if error.learned is not None:
            keep(error.learned)
        raise
    coefficients = keep(learned)
    report.draw_coefficients(coefficients, out / HEAT_MAP_FILE)

    rows = []
    if data.test:
        with console.status("evaluating"):
            rows = _compare(recipe, models, data, evaluator, frozen, granularity, learned.values)
        report.write_results(rows, out / "results.json")
    export(recipe, models, coefficients, out, rows=rows, console=console)
    if rows:
        console.print(report.results_table(rows))
    return Run(out, coefficients, rows)


def fold_file(file: Path, recipe: Recipe, *, root: Path, out: Path, console: Console) -> None:
    """Exports a merge from learned coefficients, without learning.

    Args:
        file: The coefficients.
        recipe: Says where base and experts are, and how to write the result.
        root: Folder that relative paths of the recipe start from.
        out: The folder to make; it gets `checkpoint/` and `orbax/`.
        console: Where progress is printed.

    Raises:
        InputError: The file cannot be read, or was learned for other models.
    """
    require_new(out)
    coefficients = Coefficients.load(file)
    models = open_models(recipe, root)
    learned_for = {source.name: source for source in (coefficients.base, *coefficients.experts)}
    found = {source.name: source for source in models.sources}
    if list(learned_for) != list(found):
        raise InputError(
            f"{file} was learned for {', '.join(learned_for)}; the recipe has {', '.join(found)}, "
            "and it must have the same in the same order"
        )
    for name, source in learned_for.items():
        if source.identity != found[name].identity:
            raise InputError(
                f"{file} was learned for {name} = {source.source} ({source.identity[:19]}); "
                f"{found[name].source} has other contents ({found[name].identity[:19]})"
            )
    export(recipe, models, coefficients, out, rows=[], console=console)


def evaluate(recipe: Recipe, checkpoint: str, *, root: Path, console: Console) -> Row:
    """Evaluates a checkpoint on the recipe's test data, with the heads of its experts.

    Args:
        recipe: Says which experts and which test data.
        checkpoint: Folder or Hub id of a model of the same architecture, e.g. a merged one.
        root: Folder that relative paths of the recipe start from.
        console: Where the table is printed.

    Raises:
        InputError: Something cannot be used, or a task has no test data.
    """
    models = open_models(recipe, root)
    opened = Checkpoint.open(checkpoint)
    require_same_architecture(models.base.checkpoint, opened, role="checkpoint")
    matched = match_trunk(models, opened, "checkpoint")
    data = _load_data(recipe, models, root)
    if not data.test:
        raise InputError("tasks: every task needs test data to evaluate on")
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    heads = _load_heads(recipe, models, data, dtype)
    _require_labels_in_range(models, heads, data)
    evaluator = Evaluator(
        models.family.build_trunk(models.config),
        _head_networks(models),
        heads,
        recipe.evaluation.batch_size,
    )
    parameters = load_trunk(models, matched, dtype)
    row = _accuracies(checkpoint, evaluator, parameters, data.test)
    console.print(report.results_table([row]))
    return row


class _Data(NamedTuple):
    """Examples by task; validation and test are empty unless every task has them."""

    calibration: dict[str, Examples]
    validation: dict[str, Examples]
    test: dict[str, Examples]


def _load_data(recipe: Recipe, models: Models, root: Path) -> _Data:
    inputs = models.family.inputs
    preprocessor = _preprocessor(models)
    lengths = [recipe.max_length, models.family.max_tokens(models.config)]
    lengths.append(getattr(preprocessor, "model_max_length", None))
    max_length = min(length for length in lengths if length is not None)

    def load(part: str) -> dict[str, Examples]:
        sources = {task: getattr(recipe.tasks[task], part) for task in recipe.tasks}
        given = [task for task, source in sources.items() if source is not None]
        missing = [task for task in sources if task not in given]
        if given and missing:
            raise InputError(
                f"tasks.{missing[0]}.{part}: is missing while {given[0]} has {part} data; "
                "give it for every task or for none"
            )
        return {
            task: load_examples(
                source,
                root=root,
                inputs=inputs,
                preprocessor=preprocessor,
                max_length=max_length,
                seed=recipe.seed,
                name=f"{part} data of task {task!r}",
            )
            for task, source in sources.items()
            if source is not None
        }

    data = _Data(load("calibration"), load("validation"), load("test"))
    for part in ("validation", "test"):
        for task, examples in getattr(data, part).items():
            if examples.labels is None:
                raise InputError(
                    f"tasks.{task}.{part}.label: is missing; name the column of the class index"
                )
    return data


def _preprocessor(models: Models):
    """The tokenizer or image processor of the base, or of the first expert that has one."""
    loader = AutoTokenizer if models.family.inputs[0] == "input_ids" else AutoImageProcessor
    files = {AutoTokenizer: "tokenizer_config.json", AutoImageProcessor: "preprocessor_config.json"}
    for model in (models.base, *models.experts.values()):
        if (model.checkpoint.folder / files[loader]).is_file():
            return loader.from_pretrained(model.checkpoint.folder)
    return None


def _load_heads(
    recipe: Recipe, models: Models, data: _Data, dtype: np.dtype | None
) -> dict[str, dict[str, Array]]:
    heads = {}
    for task, task_recipe in recipe.tasks.items():
        if models.family.auto_class is not None:
            head = load_head(models, task)
        else:
            names = _class_names(task, task_recipe, data)
            head = load_zero_shot_head(models, names, task_recipe.templates)
        heads[task] = {name: jnp.asarray(array, dtype) for name, array in head.items()}
    return heads


def _head_networks(models: Models) -> dict[str, Network]:
    """The head of each task as a function of its parameters."""
    return {
        task: models.family.build_head(expert.checkpoint.config)
        for task, expert in models.experts.items()
    }


def _require_labels_in_range(
    models: Models, heads: Mapping[str, Mapping[str, Array]], data: _Data
) -> None:
    """Refuses labelled data with a class that the task's head does not have."""
    for part in ("validation", "test"):
        for task, examples in getattr(data, part).items():
            if models.family.auto_class is None:
                classes = len(heads[task]["text_embeddings"])
            else:
                classes = models.experts[task].checkpoint.config.num_labels
            if examples.labels.max() >= classes:
                row = int(np.argmax(examples.labels >= classes))
                raise InputError(
                    f"{part} data of task {task!r}: example {row} has label "
                    f"{examples.labels[row]}, the task's head has classes 0 to {classes - 1}; "
                    "check that data and expert belong together"
                )


def _class_names(task: str, recipe: TaskRecipe, data: _Data) -> list[str]:
    if recipe.class_names is not None:
        return recipe.class_names
    for part in (data.test, data.calibration):
        if task in part and part[task].class_names is not None:
            return part[task].class_names
    raise InputError(
        f"tasks.{task}.class_names: is missing, and the data set does not name its classes"
    )


def _compare(
    recipe: Recipe,
    models: Models,
    data: _Data,
    evaluator: Evaluator,
    frozen: learning.Frozen,
    granularity: Granularity,
    learned: Values,
) -> list[Row]:
    """The table of results: base, experts, baselines, and the learned merge last."""
    shapes = {name: models.shapes[name] for name in frozen.deltas}
    count = len(models.experts)
    merge = jax.jit(lambda base, deltas, scales: materialize(mix(base, deltas, scales)))

    def merged(scales: Mapping[str, Array]) -> dict[str, Array]:
        return merge(frozen.base, frozen.deltas, scales)

    def of_expert(task: str) -> float:
        dtype = DTYPES[recipe.dtype] if recipe.dtype else None
        parameters = load_trunk(models, models.experts[task], dtype)
        return evaluator.accuracy(parameters, task, data.test[task])

    coefficient = PLAIN_TASK_ARITHMETIC
    if data.validation:
        coefficient = max(
            recipe.evaluation.task_arithmetic,
            key=lambda value: (
                _accuracies(
                    "", evaluator, merged(task_arithmetic(shapes, count, value)), data.validation
                ).average
            ),
        )
    rows = [
        _accuracies("base", evaluator, frozen.base, data.test),
        Row("experts (one model each)", {task: of_expert(task) for task in data.test}),
    ]
    merges = {
        "average": average(shapes, count),
        f"task arithmetic ({coefficient:g})": task_arithmetic(shapes, count, coefficient),
        f"learned ({recipe.coefficients.granularity})": granularity.scales(
            {group: jnp.asarray(values) for group, values in learned.items()}
        ),
    }
    for method, scales in merges.items():
        rows.append(_accuracies(method, evaluator, merged(scales), data.test))
    return rows


def _accuracies(
    method: str, evaluator: Evaluator, parameters: Mapping[str, Array], data: Mapping[str, Examples]
) -> Row:
    return Row(
        method,
        {task: evaluator.accuracy(parameters, task, data[task]) for task in data},
    )


def _describe(
    recipe: Recipe, models: Models, mixed: list[str], learned: learning.Learned
) -> Coefficients:
    """The learned coefficients with all that a later merge must know of them."""
    shapes = {name: models.base.shape(name) for name in mixed}
    used = GRANULARITIES[recipe.coefficients.granularity](shapes).init(1, 0.0)
    values = unstack_values(learned.values)
    base, *experts = models.sources
    return Coefficients(
        values={group: values[group] for group in used},
        granularity=recipe.coefficients.granularity,
        constraint=recipe.coefficients.constraint,
        parameters=tuple(mixed),
        base=base,
        experts=tuple(experts),
        objective=" + ".join(
            term.name if term.weight == 1 else f"{term.weight:g} {term.name}"
            for term in recipe.objectives
        ),
        seed=recipe.seed,
        step=learned.step,
    )


def _summary(
    recipe: Recipe, models: Models, mixed: list[str], initial: Values, calibration: Calibration
) -> str:
    merged = sum(int(np.prod(models.base.shape(name))) for name in mixed)
    count = sum(array.size for array in initial.values())
    unchanged = len(models.base.names) - len(mixed)
    examples = sum(map(len, calibration.learning.values()))
    held_out = sum(map(len, calibration.held_out.values()))
    return (
        f"{recipe.name}: {len(models.experts)} experts of {recipe.base.path}, "
        f"{merged / 1e6:.1f} M parameters in {len(mixed)} tensors merged"
        f"{f', {unchanged} tensors as in the base' if unchanged else ''}; "
        f"{count} coefficients (one per {recipe.coefficients.granularity} and expert); "
        f"{examples} examples to learn from, {held_out} held out; on {jax.devices()[0]}"
    )
