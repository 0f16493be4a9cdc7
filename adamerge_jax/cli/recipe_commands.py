"""The commands: their options, and the stage of the pipeline that each of them runs.

A command imports what it needs when it runs, so that help and small commands are there at once.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adamerge_jax.cli.command import CoefficientsFile, Invocation, RecipeCommand, to_type
from adamerge_jax.cli.garbage import uncollected
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import Recipe


@dataclasses.dataclass(kw_only=True)
class Learn(RecipeCommand):
    """Learn merge coefficients, compare the merge with its baselines, and export one checkpoint."""

    out: Path | None = None
    """Run folder to make; by default runs/<recipe name>."""
    resume: bool = False
    """Go on with the run in that folder from its last state, where it was interrupted."""

    def run_folder_of(self, recipe: "Recipe") -> Path:
        """Returns the run folder."""
        return self.out or Path("runs") / recipe.name

    def run(self, call: Invocation) -> None:
        """Learns, exports, and says where the results are."""
        from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER
        from adamerge_jax.pipeline.run_learn import learn
        from adamerge_jax.plan import pick_fields
        from adamerge_jax.runs.files import COEFFICIENTS_FILE, HEAT_MAP_FILE, PAGE_FILE

        out = self.run_folder_of(call.recipe)
        result = learn(
            call.recipe,
            root=call.root,
            out=out,
            console=call.console,
            resume=self.resume,
            pick_fields=pick_fields,
        )
        call.print_places(
            f"merged checkpoint {out / CHECKPOINT_FOLDER}\n"
            f"coefficients      {out / COEFFICIENTS_FILE} (after "
            f"{result.coefficients.step} steps, chosen by the held-out objective alone)\n"
            f"heat map          {out / HEAT_MAP_FILE}\n"
            f"report            {out / PAGE_FILE}{_adapter_line(call, out)}"
        )


@dataclasses.dataclass(kw_only=True)
class Search(RecipeCommand):
    """Find coefficients by a score, without gradients: accuracy, loss, or what a command prints."""

    out: Path | None = None
    """Run folder to make; by default runs/<recipe name>-search."""
    resume: bool = False
    """Go on with the search in that folder after its last evaluation, where it was interrupted."""
    score_command: str | None = None
    """Command whose last number on standard output is the score, with {checkpoint} where the folder
    of the merge goes: 'python score.py {checkpoint}'. It is run without a shell."""
    score_timeout: float = 3600.0
    """Seconds that the command may take for one merge."""

    def run_folder_of(self, recipe: "Recipe") -> Path:
        """Returns the run folder."""
        return self.out or Path("runs") / f"{recipe.name}-search"

    def run(self, call: Invocation) -> None:
        """Searches, exports, and says where the results are."""
        from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER
        from adamerge_jax.runs.files import COEFFICIENTS_FILE, EVALUATIONS_FILE, PAGE_FILE
        from adamerge_jax.search.run_search import ScoreCommand, search

        if not self.score_timeout > 0:
            raise InputError(
                f"--score-timeout: found {self.score_timeout:g}, expected a number over 0"
            )
        out, command = self.run_folder_of(call.recipe), None
        if self.score_command is not None:
            command = ScoreCommand(self.score_command, self.score_timeout)
        result = search(
            call.recipe,
            root=call.root,
            out=out,
            console=call.console,
            command=command,
            resume=self.resume,
        )
        call.print_places(
            f"merged checkpoint {out / CHECKPOINT_FOLDER}\n"
            f"coefficients      {out / COEFFICIENTS_FILE} (of evaluation "
            f"{result.coefficients.step}, chosen by its score)\n"
            f"evaluations       {out / EVALUATIONS_FILE}\n"
            f"report            {out / PAGE_FILE}{_adapter_line(call, out)}"
        )


@dataclasses.dataclass(kw_only=True)
class Front(RecipeCommand):
    """Find what one task costs another: merges of which none is better in every task (MAP)."""

    out: Path | None = None
    """Run folder to make; by default runs/<recipe name>-front."""
    resume: bool = False
    """Go on with the run in that folder after its last evaluation, where it was interrupted."""

    def run_folder_of(self, recipe: "Recipe") -> Path:
        """Returns the run folder."""
        return self.out or Path("runs") / f"{recipe.name}-front"

    def run(self, call: Invocation) -> None:
        """Finds the front, and says where it is and how to fold a point."""
        from adamerge_jax.runs.files import FRONT_FILE, FRONT_FOLDER, FRONT_PICTURE_FILE, PAGE_FILE
        from adamerge_jax.search.run_front import front

        out = self.run_folder_of(call.recipe)
        found = front(
            call.recipe, root=call.root, out=out, console=call.console, resume=self.resume
        ).front
        best = out / FRONT_FOLDER / found.points[found.best].file
        call.print_places(
            f"front             {out / FRONT_FILE}, {len(found.points)} points\n"
            f"picture           {out / FRONT_PICTURE_FILE}\n"
            f"coefficients      {out / FRONT_FOLDER}/01.safetensors and so on; best on average "
            f"{best.name}\n"
            f"report            {out / PAGE_FILE}\n"
            f"fold a point with: {to_type('fold', self.recipe_file, best, '--out', 'MERGED')}"
        )


@dataclasses.dataclass(kw_only=True)
class Plan(RecipeCommand):
    """Predict memory, time and disk of a recipe's merge, and what to change; reads no weight."""

    answers = True

    device: str | None = None
    """Predict for this one: cpu, h100, h200, a100, l4, tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e; by
    default for the present device, for which the step is compiled."""

    def run(self, call: Invocation) -> None:
        """Prints the prediction."""
        with uncollected(), call.console.status("planning") as status:
            from adamerge_jax.plan import make_plan, print_plan

            plan = make_plan(
                call.recipe, call.root, self.device, lambda line: status.update(f"planning: {line}")
            )
        print_plan(plan, call.console)


@dataclasses.dataclass(kw_only=True)
class Fold(RecipeCommand):
    """Export the merge of a coefficients file, without learning."""

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run or of a merge by a method, or the run folder."""
    out: Path
    """Folder to make."""
    scale: tuple[str, ...] = ()
    """Factors of experts' coefficients: trec=0.5 sst2=0; 0 leaves an expert out."""
    allow_other_models: bool = False
    """Go on with models that the file was not learned for."""

    def run(self, call: Invocation) -> None:
        """Exports the merge, and says where it is."""
        from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER
        from adamerge_jax.pipeline.match import parse_scale
        from adamerge_jax.pipeline.run_fold import fold_file

        fold_file(
            self.coefficients,
            call.recipe,
            root=call.root,
            out=self.out,
            console=call.console,
            scale=parse_scale(self.scale),
            allow_other_models=self.allow_other_models,
        )
        checkpoint = self.out / CHECKPOINT_FOLDER
        call.print_places(f"merged checkpoint {checkpoint}{_adapter_line(call, self.out)}")


@dataclasses.dataclass(kw_only=True)
class Merge(RecipeCommand):
    """Export a merge by a method that learns nothing; data is read only where it needs some."""

    method: str
    """The method, e.g. ties or pcb (docs/guides/methods.md has all), or package.module:function."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the method, e.g. {coefficient: 0.4}."""
    out: Path
    """Folder to make."""

    def run(self, call: Invocation) -> None:
        """Exports the merge, and says where it is."""
        from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER
        from adamerge_jax.pipeline.run_merge import merge
        from adamerge_jax.registry import allow_code
        from adamerge_jax.runs.files import COEFFICIENTS_FILE

        if not isinstance(self.options, dict):  # any YAML can be given
            raise InputError(
                f"--options: found {self.options!r:.80}, expected the method's arguments by name, "
                "such as '{coefficient: 0.4}'"
            )
        if self.allow_code:
            allow_code([self.method])
        merge(
            call.recipe,
            self.method,
            self.options,
            root=call.root,
            out=self.out,
            console=call.console,
        )
        call.print_places(
            f"merged checkpoint {self.out / CHECKPOINT_FOLDER}\n"
            f"coefficients      {self.out / COEFFICIENTS_FILE} (to fold it again)"
        )


@dataclasses.dataclass(kw_only=True)
class CompareMethods(RecipeCommand):
    """Compare merge methods, presets and the recipe's own learning on test data, over seeds.

    Each is measured in a process of its own and its row is kept: the same command goes on where a
    comparison was stopped, and measures only what changed.
    """

    answers = True

    methods: tuple[str, ...] = ("methods", "recipe")
    """Contenders: merge methods, presets, recipe (learning as the recipe says), methods or
    presets (all of them). With options in YAML: '{ties: {density: 0.3}}', of a preset or the recipe
    fields: '{recipe: {learning: {steps: 50}}}'. Of a list of numbers, '{dare: {coefficient: [0.2,
    0.4]}}', validation data choose one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of methods with any randomness."""
    with_heads: tuple[Literal["kept", "scaled", "refitted", "learned"], ...] = ()
    """Heads that each method is measured with: kept, scaled, refitted, and learned where
    coefficients are. By default learning has those of its recipe or preset, and merges without
    learning the experts' own and, if the recipe's are others, fitted ones too."""
    out: Path | None = None
    """Folder of the rows and tables; by default runs/<recipe name>-methods."""

    def run(self, call: Invocation) -> None:
        """Measures what is missing, prints the tables, and says where they are."""
        from adamerge_jax.comparison.compare import MARKDOWN_FILE, PICTURE_FILE, compare_methods

        out = self.out or Path("runs") / f"{call.recipe.name}-methods"
        compare_methods(
            call.recipe,
            self.methods,
            self.seeds,
            self.with_heads,
            root=call.root,
            out=out,
            console=call.console,
            allow_code=self.allow_code,
        )
        call.console.print(
            f"tables  {out / MARKDOWN_FILE}\npicture {out / PICTURE_FILE}",
            highlight=False,
            soft_wrap=True,
        )


@dataclasses.dataclass(kw_only=True)
class Evaluate(RecipeCommand):
    """Evaluate a checkpoint on a recipe's test data, with its experts' heads, and by lm-eval."""

    answers = True

    checkpoint: str
    """Folder or Hub id of a model of the same architecture, or the run folder of a merge."""

    def run(self, call: Invocation) -> None:
        """Prints the table of results."""
        from adamerge_jax.pipeline.run_evaluate import evaluate

        evaluate(call.recipe, self.checkpoint, root=call.root, console=call.console)


def _adapter_line(call: Invocation, out: Path) -> str:
    """Returns the line that says where the adapter is, if there is one."""
    from adamerge_jax.pipeline.export import ADAPTER_FOLDER

    return f"\nadapter           {out / ADAPTER_FOLDER}" if call.recipe.export.adapter else ""
