"""A recipe in one's own code: run as the command runs it, or prepared for a loop of one's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from adamerge_jax.coefficients.granularities import Shapes
from adamerge_jax.data.batches import Calibration
from adamerge_jax.errors import InputError
from adamerge_jax.learning.forward import Forward
from adamerge_jax.learning.learner import Frozen
from adamerge_jax.learning.loop import Progress
from adamerge_jax.own_model.progress import OnStep, show_line
from adamerge_jax.parameter_names import is_stacked, tensors_of
from adamerge_jax.pipeline import run_learn
from adamerge_jax.pipeline.baselines import baseline_rows
from adamerge_jax.pipeline.ended_run import Run
from adamerge_jax.pipeline.learn import LearningInputs, MergeResult, learn_coefficients
from adamerge_jax.pipeline.learn import prepare as read_and_ask
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.plan import pick_fields
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.rows import Row
from adamerge_jax.task_vectors import LoadedDelta
from adamerge_jax.task_vectors.similarity import cosines, inner_products


def run_recipe(
    recipe: Recipe,
    out: Path | str,
    *,
    root: Path | str = ".",
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Learns a recipe's merge and exports it, as `adamerge learn` does.

    Args:
        recipe: The recipe.
        out: The run folder to make, with checkpoint, coefficients, table of results and page.
        root: Folder that relative paths of the recipe start from.
        resume: If True, the run in `out` goes on where it was interrupted.
        progress: If False, nothing is printed.

    Returns:
        The run's folder, its learned coefficients, `[K, ...]` by group, and its table of results.

    Raises:
        InputError: The recipe, a checkpoint or data cannot be used, or the folder is in use.
        NonFiniteObjectiveError: Learning diverged.

    Examples:
        >>> import adamerge_jax as am
        >>> recipe = am.parse_recipe(
        ...     {"base": "none", "tasks": {"a": {"expert": "none", "calibration": "none.jsonl"}}}
        ... )
        >>> try:
        ...     am.run_recipe(recipe, "runs/mine", progress=False)
        ... except am.InputError as error:
        ...     print(str(error)[:10])
        base: none
    """
    console = Console(quiet=not progress)
    return run_learn.learn(
        recipe,
        root=Path(root),
        out=Path(out),
        console=console,
        resume=resume,
        pick_fields=pick_fields,
    )


def prepare(recipe: Recipe, root: Path | str = ".", *, progress: bool = True) -> "Prepared":
    """Reads a recipe's task vectors and data, and asks its experts; learns and writes nothing.

    Args:
        recipe: The recipe.
        root: Folder that its relative paths start from.
        progress: If False, nothing is shown, neither now nor in learning.

    Raises:
        InputError: A checkpoint or data cannot be used.

    Examples:
        >>> import tempfile
        >>> from rich.console import Console
        >>> import adamerge_jax as am
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = f"{parent}/digits"
        ...     quiet = Console(quiet=True)
        ...     am.quickstart.prepare(folder, console=quiet, base_steps=1, expert_steps=1)
        ...     changes = {"preset": "adamerging-task", "learning": {"steps": 1, "batch_size": 2}}
        ...     recipe = am.load_recipe(f"{folder}/recipe.yaml", changes=changes)
        ...     prepared = am.prepare(recipe, folder, progress=False)
        ...     merge = prepared.learn()
        >>> merge.coefficients.names, len(prepared.deltas)
        (('upright', 'rotated', 'inverted', 'faint'), 22)
    """
    console = Console(quiet=not progress)
    workspace = open_workspace(recipe, Path(root), show_count=count_on(console))
    method = build(recipe, workspace.models)
    inputs = read_and_ask(method, workspace, show_count=count_on(console))
    return Prepared(recipe, inputs, console)


class Prepared(NamedTuple):
    """A recipe's models and data, for ablations and loops of one's own.

    The names of stacked layers have a `*`; K experts.

    Attributes:
        recipe: The recipe.
        inputs: All that the stages of a run hand on: the method, the workspace, calibration data.
        console: The console for progress.

    Examples:
        >>> import adamerge_jax as am
        >>> [name for name in ("deltas", "forward", "frozen") if hasattr(am.Prepared, name)]
        ['deltas', 'forward', 'frozen']
    """

    recipe: Recipe
    inputs: LearningInputs
    console: Console

    @property
    def experts(self) -> list[str]:
        """Names of the K experts."""
        return list(self.inputs.workspace.models.experts)

    @property
    def base(self) -> dict[str, Array]:
        """The parameters by name to which task vectors are added, `[*shape]`."""
        return self.inputs.theta_start

    @property
    def deltas(self) -> dict[str, LoadedDelta]:
        """The experts' task vectors by parameter, after the interference steps."""
        return self.inputs.deltas

    @property
    def shapes(self) -> Shapes:
        """The shapes of the parameters that are mixed, `(L, *shape)` where stacked."""
        return self.inputs.shapes

    @property
    def calibration(self) -> Calibration:
        """The examples to learn from and those held out, with the targets of the objectives."""
        return self.inputs.calibration

    @property
    def forward(self) -> Forward:
        """The merged model with each task's head, for `make_learner`."""
        return self.inputs.workspace.forward(self.inputs.method.target_specs.values())

    @property
    def frozen(self) -> Frozen:
        """The base, the task vectors and the experts' heads, for `learn`."""
        return Frozen(self.base, self.deltas, list(self.inputs.workspace.heads.values()))

    def learn(self, on_step: OnStep = lambda progress: None) -> MergeResult:
        """Learns as the recipe says; a line shows the time left.

        Args:
            on_step: Called with each step's `Progress`, and once before the first, as by `learn`:
                `step`, `per_task`, `held_out`, and `best`, the coefficients if they are the best so
                far. Of a coarse stage before the recipe's granularity, too.

        Raises:
            InputError: The granularity does not fit the parameters.
            NonFiniteObjectiveError: Learning diverged.
        """

        @contextmanager
        def show_stage(summary: str, steps: int) -> Iterator[OnStep]:
            with show_line(steps, self.console) as show:

                def show_and_call(progress: Progress) -> None:
                    show(progress)
                    on_step(progress)

                yield show_and_call

        return learn_coefficients(
            self.inputs, show_stage=show_stage, show_count=count_on(self.console)
        )

    def evaluate(self, merge: MergeResult | Mapping[str, Array], name: str = "merge") -> Row:
        """Returns a merge's scores on the recipe's test data.

        Args:
            merge: A learned merge, with its heads, or the parameters of a merge by name, which gets
                the experts' heads.
            name: The name of the row.

        Raises:
            InputError: The recipe has no test data.
        """
        workspace, parameters = self.inputs.workspace, merge
        self._require_test_data()
        evaluator = workspace.evaluator
        if isinstance(merge, MergeResult):
            evaluator, parameters = evaluator.with_heads(merge.heads), merge.parameters(self.base)
        return evaluator.row(name, parameters, workspace.data.test, "learned")

    def baselines(self) -> dict[str, Row]:
        """Returns the scores of the base, the experts and merges without learning, by their names.

        Raises:
            InputError: The recipe has no test data.
        """
        self._require_test_data()
        rows = baseline_rows(self.inputs, self.recipe.evaluation, self.console)
        return {row.method: row for row in rows}

    def cosines(self) -> dict[str, Float[np.ndarray, "K K"]]:
        """Returns the cosines between the experts' task vectors, by tensor without `*`."""
        by_tensor: dict[str, Float[np.ndarray, "K K"]] = {}
        for name, delta in self.deltas.items():
            stacked, shape = is_stacked(name), self.shapes[name]
            products = inner_products(delta, shape, len(self.experts), stacked=stacked)
            tensors = tensors_of(name, shape)
            by_layer = products if stacked else [products]
            by_tensor.update(zip(tensors, map(cosines, by_layer), strict=True))
        return by_tensor

    def _require_test_data(self) -> None:
        if not self.inputs.workspace.data.test:
            raise InputError("the recipe has no test data; give every task a source `test`")
