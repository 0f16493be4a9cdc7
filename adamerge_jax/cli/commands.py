"""The commands: their options, and the stage of the pipeline that each of them runs.

A command imports what it needs when it runs, so that help and small commands are there at once.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import tyro
from rich.console import Console

from adamerge_jax.errors import InputError, in_hand

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import Recipe


CoefficientsFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="COEFFICIENTS")]


class Invocation(NamedTuple):
    """All that a command with a recipe gets beside its own options.

    Attributes:
        recipe: The recipe, changed by what the command line says of its fields.
        root: The folder that relative paths of the recipe start from.
        console: The console for progress and results.
    """

    recipe: "Recipe"
    root: Path
    console: Console

    def print_places(self, lines: str) -> None:
        """Prints where results are; the first of several processes alone does."""
        from adamerge_jax.devices import is_first_process

        if is_first_process():
            self.console.print(lines, highlight=False, soft_wrap=True)


@dataclasses.dataclass(kw_only=True)
class Command:
    """A command, and the options of all commands."""

    quiet: bool = False
    """Show warnings, errors and the asked-for answer alone: no progress, no summary."""
    verbose: bool = False
    """Show what the libraries log as well, with the time."""

    answers: ClassVar[bool] = False
    """True for a command that is asked for what it prints."""

    @property
    def common_options(self) -> "Command":
        """The options of the command: itself."""
        return self

    @property
    def run_folder(self) -> Path | None:
        """The run folder that the command writes to, if it does and needs no recipe to say so."""
        return None


@dataclasses.dataclass(kw_only=True)
class RecipeCommand(Command):
    """A command that takes a recipe, whose fields are options too."""

    recipe_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """The recipe, a YAML file."""
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""
    allow_code: bool = False
    """Run the functions of somebody's own that the recipe names, package.module:function."""

    @property
    def folder(self) -> Path:
        """The folder that relative paths of the recipe start from."""
        return (self.root or self.recipe_file.parent).expanduser().resolve()

    def run_folder_of(self, recipe: "Recipe") -> Path | None:
        """Returns the run folder that the command writes to for a recipe, if it does."""
        return None

    def run(self, call: Invocation) -> None:
        """Runs the command."""
        raise NotImplementedError


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
        from adamerge_jax.pipeline.run import learn
        from adamerge_jax.runs.files import COEFFICIENTS_FILE, HEAT_MAP_FILE, PAGE_FILE

        out = self.run_folder_of(call.recipe)
        result = learn(
            call.recipe, root=call.root, out=out, console=call.console, resume=self.resume
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
        from adamerge_jax.pipeline.run_search import ScoreCommand, search
        from adamerge_jax.runs.files import COEFFICIENTS_FILE, EVALUATIONS_FILE, PAGE_FILE

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
        from adamerge_jax.pipeline.run_front import front
        from adamerge_jax.runs.files import FRONT_FILE, FRONT_FOLDER, FRONT_PICTURE_FILE, PAGE_FILE

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
            f"fold a point with: adamerge fold {self.recipe_file} {best} --out MERGED"
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
        from adamerge_jax.plan import make_plan, print_plan

        print_plan(make_plan(call.recipe, call.root, self.device), call.console)


@dataclasses.dataclass(kw_only=True)
class Fold(RecipeCommand):
    """Export the merge of a coefficients file, without learning."""

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run, or of a merge by a method."""
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
        from adamerge_jax.pipeline.run import fold_file

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
        from adamerge_jax.pipeline.run import merge
        from adamerge_jax.registry import allow_code
        from adamerge_jax.runs.files import COEFFICIENTS_FILE

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
    """What to compare: merge methods, presets, recipe (learning as the recipe says), methods or
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
class Mergekit(RecipeCommand):
    """Write the merge of a coefficients file as a YAML file that mergekit makes it from."""

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run: whole experts, one coefficient per tensor or
    coarser, no interference steps."""
    out: Path
    """YAML file to make."""

    def run(self, call: Invocation) -> None:
        """Writes the file, and says how to use it."""
        from adamerge_jax.pipeline.run import write_mergekit

        write_mergekit(
            self.coefficients, call.recipe, root=call.root, out=self.out, console=call.console
        )
        call.console.print(f"run: mergekit-yaml {self.out} MERGED", soft_wrap=True)


@dataclasses.dataclass(kw_only=True)
class Evaluate(RecipeCommand):
    """Evaluate a checkpoint on a recipe's test data, with the heads of its experts."""

    answers = True

    checkpoint: str
    """Folder or Hub id of a model of the same architecture, e.g. a merged one."""

    def run(self, call: Invocation) -> None:
        """Prints the table of results."""
        from adamerge_jax.pipeline.run import evaluate

        evaluate(call.recipe, self.checkpoint, root=call.root, console=call.console)


@dataclasses.dataclass
class Inspect(Command):
    """Show what a coefficients file says."""

    answers = True

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run."""

    def run(self, console: Console) -> None:
        """Prints the file's facts and mean coefficients."""
        from adamerge_jax.coefficients.file import Coefficients
        from adamerge_jax.report.coefficients import print_coefficients

        with in_hand(self.coefficients):
            print_coefficients(Coefficients.load(self.coefficients), console)


@dataclasses.dataclass
class Compare(Command):
    """Show what differs between two coefficients files: what, where, how much."""

    answers = True

    first: CoefficientsFile
    """A coefficients file."""
    second: CoefficientsFile
    """Another one; differences are this one's values less the first one's."""
    out: Path | None = None
    """A .png file to draw the map of differences to."""

    def run(self, console: Console) -> None:
        """Prints the differences, and draws them where asked to."""
        from adamerge_jax.coefficients.file import Coefficients
        from adamerge_jax.report.comparison import compare, print_comparison
        from adamerge_jax.report.maps import draw_comparison
        from adamerge_jax.report.plain_text import one_line
        from adamerge_jax.report.results import outcome_in_words
        from adamerge_jax.runs.files import RESULTS_FILE
        from adamerge_jax.runs.results import read_results

        out = self.out and self.out.expanduser()
        if out is not None and (out.suffix != ".png" or not out.parent.is_dir()):
            raise InputError(f"--out {out}: expected a .png file in a folder that exists")
        loaded = []
        for file in (self.first, self.second):
            with in_hand(file):
                loaded.append(Coefficients.load(file))
        comparison = compare(*loaded)
        print_comparison(comparison, console)
        for name, file in (("first", self.first), ("second", self.second)):
            rows, outcome, _ = read_results(file.expanduser().parent / RESULTS_FILE)
            if rows:
                words = outcome_in_words(outcome, rows[-1].metric, name=one_line)
                console.print(f"{name}: {words}", highlight=False, soft_wrap=True)
        if out is not None:
            draw_comparison(comparison, out)
            console.print(f"map of differences {out}", highlight=False, soft_wrap=True)


@dataclasses.dataclass
class Report(Command):
    """Write the report of a run anew, finished or not: one HTML page that needs nothing else."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """The run folder."""

    def run(self, console: Console) -> None:
        """Writes the page, and says where it is."""
        from adamerge_jax.report.page import write_page

        with in_hand(self.folder):
            page = write_page(self.folder)
        console.print(f"report {page}", highlight=False, soft_wrap=True)


COMMANDS: dict[str, type] = {
    "learn": Learn,
    "search": Search,
    "front": Front,
    "plan": Plan,
    "fold": Fold,
    "merge": Merge,
    "compare-methods": CompareMethods,
    "mergekit": Mergekit,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "compare": Compare,
    "report": Report,
}
"""The commands by name."""


def _adapter_line(call: Invocation, out: Path) -> str:
    """Returns the line that says where the adapter is, if there is one."""
    from adamerge_jax.pipeline.export import ADAPTER_FOLDER

    return f"\nadapter           {out / ADAPTER_FOLDER}" if call.recipe.export.adapter else ""
