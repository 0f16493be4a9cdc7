"""The command `evaluate`: from a checkpoint to its row of the table."""

from pathlib import Path

from rich.console import Console

from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.config_file import CONFIG_FILE
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.devices import is_first_process, open_devices
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import require_harness
from adamerge_jax.pipeline.end_of_text import ends_in_words
from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER
from adamerge_jax.pipeline.harness_rows import harness_results, open_harness
from adamerge_jax.pipeline.heads import read_heads
from adamerge_jax.pipeline.models import match_backbone, open_models
from adamerge_jax.pipeline.printing import print_results
from adamerge_jax.pipeline.processes import silence_others
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import Row


def evaluate(recipe: Recipe, checkpoint: str, *, root: Path, console: Console) -> Row | None:
    """Evaluates a checkpoint on the recipe's test data, with its own heads or those of experts.

    And on the tasks of lm-eval, where the recipe asks for some.

    Args:
        recipe: The recipe with the experts and the test data.
        checkpoint: The folder or Hub id of a model of the same architecture, or the run folder of
            a merge.
        root: Folder that relative paths of the recipe start from.
        console: The console that shows the table.

    Returns:
        The row of the table, with a score for each task; None without test data.

    Raises:
        InputError: A model or data cannot be used, or there is neither test data nor lm-eval.
    """
    console = silence_others(console)
    require_harness(recipe.evaluation.lm_eval)
    opened = Checkpoint.open(_checkpoint_in(checkpoint))
    is_tested = all(task.test is not None for task in recipe.tasks.values())
    if not is_tested and recipe.evaluation.lm_eval is None:
        raise InputError("tasks: every task needs test data to evaluate on")
    row = None
    if is_tested:
        devices = open_devices(**recipe.devices.model_dump())
        workspace = open_workspace(recipe, root, devices, count_on(console))
        models = workspace.models
    else:
        models = open_models(recipe, root, to_run=False)
    require_same_architecture(models.base.checkpoint, opened, role="checkpoint")
    matched = match_backbone(models, opened, "checkpoint")
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    if is_tested:
        if ends := ends_in_words(workspace.data.test, workspace.asked_ends):
            console.print(ends, highlight=False, soft_wrap=True)
        parameters = load_backbone(models, matched, workspace.dtype)
        evaluator = workspace.evaluator.with_heads(read_heads(workspace, opened))
        row = evaluator.row(checkpoint, parameters, workspace.data.test)
        del parameters
        print_results(Results.of_rows([row]), console)
    if harness is not None and is_first_process():
        scores = harness_results(harness, models, opened.folder, console, name=checkpoint)
        print_results(Results([], harness=scores), console)
    return row


def _checkpoint_in(path: str) -> str:
    """Returns the checkpoint that a path names: itself, or that of a run folder."""
    inside = Path(path).expanduser() / CHECKPOINT_FOLDER
    return str(inside) if (inside / CONFIG_FILE).is_file() else path
