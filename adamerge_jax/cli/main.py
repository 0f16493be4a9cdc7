"""The `adamerge` command.

A recipe's fields are the options of the command: the file gives their defaults, the command line
overrides them. So the recipe is read first, then the command line is parsed. Lists of sections, and
mappings of any names, are written on the command line as in the file: in YAML.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import transformers
import tyro
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.logging import RichHandler

from adamerge_jax import report
from adamerge_jax.cli.compilation import keep_compiled_programs
from adamerge_jax.cli.console import make_console
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.devices import is_first_process
from adamerge_jax.errors import InputError
from adamerge_jax.learning.learner import NonFiniteObjectiveError
from adamerge_jax.pipeline import export as exporting
from adamerge_jax.pipeline import run as jobs
from adamerge_jax.pipeline.match import parse_scale
from adamerge_jax.plan import make_plan, print_plan
from adamerge_jax.recipes.presets import drop_options_of_replaced
from adamerge_jax.recipes.schema import (
    Recipe,
    Section,
    describe_validation_error,
    load_recipe,
    parse_recipe,
    read_yaml,
)
from adamerge_jax.runs.folder import COEFFICIENTS_FILE, HEAT_MAP_FILE

RecipeFields = Annotated[Recipe, tyro.conf.arg(name="")]


@dataclasses.dataclass
class Learn:
    """Learn merge coefficients, compare the merge with its baselines, and export one checkpoint."""

    file: tyro.conf.Positional[Path]
    """The recipe, a YAML file."""
    recipe: RecipeFields
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""
    out: Path | None = None
    """Run folder to make; by default runs/<recipe name>."""
    resume: bool = False
    """Go on with the run in that folder from its last state, where it was interrupted."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        out = self.out or Path("runs") / self.recipe.name
        run = jobs.learn(
            self.recipe,
            root=_root(self.file, self.root),
            out=out,
            console=console,
            resume=self.resume,
        )
        if not is_first_process():
            return
        console.print(
            f"merged checkpoint {out / exporting.CHECKPOINT_FOLDER}\n"
            f"coefficients      {out / COEFFICIENTS_FILE} (best after "
            f"{run.coefficients.step} steps)\n"
            f"heat map          {out / HEAT_MAP_FILE}\n"
            f"report            {out / report.PAGE_FILE}{_adapter(self.recipe, out)}",
            highlight=False,
            soft_wrap=True,
        )


@dataclasses.dataclass
class Fold:
    """Export the merge of a coefficients file, without learning."""

    coefficients: tyro.conf.Positional[Path]
    """The coefficients.safetensors of a run."""
    recipe_file: Annotated[Path, tyro.conf.arg(name="recipe")]
    """The recipe, a YAML file: where base and experts are, how to write the result."""
    out: Path
    """Folder to make."""
    recipe: RecipeFields
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""
    scale: tuple[str, ...] = ()
    """What to multiply experts' coefficients with: trec=0.5 sst2=0; 0 leaves an expert out."""
    allow_other_models: bool = False
    """Whether to go on with models that the file was not learned for."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        jobs.fold_file(
            self.coefficients,
            self.recipe,
            root=_root(self.recipe_file, self.root),
            out=self.out,
            console=console,
            scale=parse_scale(self.scale),
            allow_other_models=self.allow_other_models,
        )
        if not is_first_process():
            return
        console.print(
            f"merged checkpoint {self.out / exporting.CHECKPOINT_FOLDER}"
            f"{_adapter(self.recipe, self.out)}",
            soft_wrap=True,
        )


@dataclasses.dataclass
class Mergekit:
    """Write the merge of a coefficients file as a YAML file that mergekit makes it from."""

    coefficients: tyro.conf.Positional[Path]
    """The coefficients.safetensors of a run: whole experts, one coefficient per tensor or
    coarser, no interference steps."""
    recipe_file: Annotated[Path, tyro.conf.arg(name="recipe")]
    """The recipe, a YAML file: where base and experts are."""
    out: Path
    """YAML file to make."""
    recipe: RecipeFields
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        root = _root(self.recipe_file, self.root)
        jobs.write_mergekit(
            self.coefficients, self.recipe, root=root, out=self.out, console=console
        )
        console.print(f"run: mergekit-yaml {self.out} MERGED", soft_wrap=True)


@dataclasses.dataclass
class Evaluate:
    """Evaluate a checkpoint on a recipe's test data, with the heads of its experts."""

    file: tyro.conf.Positional[Path]
    """The recipe, a YAML file."""
    checkpoint: str
    """Folder or Hub id of a model of the same architecture, e.g. a merged one."""
    recipe: RecipeFields
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        root = _root(self.file, self.root)
        jobs.evaluate(self.recipe, self.checkpoint, root=root, console=console)


@dataclasses.dataclass
class Plan:
    """Predict memory, time and disk of a recipe's merge, and what to change; reads no weight."""

    file: tyro.conf.Positional[Path]
    """The recipe, a YAML file."""
    recipe: RecipeFields
    root: Path | None = None
    """Folder that relative paths of the recipe start from; by default the recipe's own."""
    device: str | None = None
    """Predict for this one: cpu, h100, h200, a100, l4, tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e; by
    default for the present device, for which the step is compiled."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        print_plan(make_plan(self.recipe, _root(self.file, self.root), self.device), console)


@dataclasses.dataclass
class Inspect:
    """Show what a coefficients file says."""

    coefficients: tyro.conf.Positional[Path]
    """The coefficients.safetensors of a run."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        report.print_coefficients(Coefficients.load(self.coefficients), console)


@dataclasses.dataclass
class Compare:
    """Show what differs between two coefficients files: what, where, how much."""

    first: tyro.conf.Positional[Path]
    """A coefficients file."""
    second: tyro.conf.Positional[Path]
    """Another one; differences are this one's values less the first one's."""
    out: Path | None = None
    """A .png file to draw the map of differences to."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        jobs.compare_files(self.first, self.second, out=self.out, console=console)


@dataclasses.dataclass
class Report:
    """Write the report of a run anew, finished or not: one HTML page that needs nothing else."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        page = report.write_page(self.folder)
        console.print(f"report {page}", highlight=False, soft_wrap=True)


_DESCRIPTION = "Merge fine-tuned experts of one base model into one checkpoint."

# Whose fields `--help` shows when no recipe is given.
_EXAMPLE = {"base": "BASE", "tasks": {"TASK": {"expert": "EXPERT", "calibration": "DATA"}}}

COMMANDS = {
    "learn": Learn,
    "plan": Plan,
    "fold": Fold,
    "mergekit": Mergekit,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "compare": Compare,
    "report": Report,
}


_CONSTRUCTORS = tyro.constructors.ConstructorRegistry()


@_CONSTRUCTORS.primitive_rule
def _from_yaml(
    field: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How fields are given that have no fixed names within: options, and lists of sections."""
    inner = [own for own in get_args(field.type) if isinstance(own, type)]
    of_sections = field.type_origin is list and any(issubclass(own, Section) for own in inner)
    if field.type != dict[str, Any] and not of_sections:
        return None

    def write(value: Any) -> list[str]:
        if of_sections:
            value = [each.model_dump(exclude_defaults=True) for each in value]
        return [yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="YAML",
        instance_from_str=lambda given: read_yaml(given[0]),
        is_instance=lambda value: isinstance(value, field.type_origin),
        str_from_instance=write,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends in one line on standard error and exit status 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    transformers.logging.set_verbosity_error()
    keep_compiled_programs()
    try:
        _parse(sys.argv[1:] if arguments is None else list(arguments)).run(make_console())
    except InputError as error:
        _exit(f"error: {error}", 2)
    except NonFiniteObjectiveError as error:
        kept = "; the run folder keeps the last good coefficients" if error.learned else ""
        _exit(f"error: {error}{kept}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def learn(arguments: Sequence[str] | None = None) -> None:
    """`adamerge learn`, for launchers."""
    main(["learn", *(sys.argv[1:] if arguments is None else arguments)])


Command = Learn | Plan | Fold | Mergekit | Evaluate | Inspect | Compare | Report


def _parse(arguments: list[str]) -> Command:
    """Parses the command line, with the recipe that it names as the default of all fields.

    Raises:
        InputError: The recipe, or a field given on the command line, cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="adamerge", description=_DESCRIPTION, args=["--help"]
        )
    name, *options = arguments
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    default = None
    if "recipe" in {field.name for field in dataclasses.fields(command)}:
        file = _recipe_file(options)
        if file is not None:
            recipe = load_recipe(file, _preset(options))
        elif {"-h", "--help"} & set(options):
            recipe = parse_recipe(_EXAMPLE)
        else:
            raise InputError(f"adamerge {name}: give a recipe, a .yaml file")
        required = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(command)
            if field.default is dataclasses.MISSING
        }
        default = command(**required | {"recipe": recipe})
    try:
        parsed = tyro.cli(
            command,
            default=default,
            args=options,
            prog=f"adamerge {name}",
            config=(tyro.conf.AvoidSubcommands,),
            registry=_CONSTRUCTORS,
        )
    except ValidationError as error:
        raise InputError(f"command line: {describe_validation_error(error)}") from error
    if default is not None:
        changed = {o.removeprefix("--").partition("=")[0].replace("-", "_") for o in options}
        fields = drop_options_of_replaced(
            parsed.recipe.model_dump(), default.recipe.model_dump(), changed
        )
        # Once more as a whole: what a field may be can depend on another.
        parsed.recipe = parse_recipe(fields, "command line")
    return parsed


_OTHER_FILES = ("--coefficients.start", "--out")
"""Options whose value may be a YAML file that is no recipe."""


def _recipe_file(options: Sequence[str]) -> Path | None:
    """The recipe on the command line: its fields are the defaults of all other options."""
    named = _value(options, "--recipe")
    files = [
        option
        for before, option in zip(["", *options], options, strict=False)
        if Path(option).suffix in (".yaml", ".yml")
        and not option.startswith("--")
        and before not in _OTHER_FILES
    ]
    return Path(named or files[0]) if named or files else None


def _preset(options: Sequence[str]) -> str | None:
    """The preset on the command line: it decides on the defaults of all other options."""
    return _value(options, "--preset")


def _value(options: Sequence[str], name: str) -> str | None:
    """What an option is given, before the command line is parsed."""
    for option, following in zip(options, [*options, ""][1:], strict=True):
        if option == name:
            return following
        if option.startswith(f"{name}="):
            return option.removeprefix(f"{name}=")
    return None


def _adapter(recipe: Recipe, out: Path) -> str:
    """The line that says where the adapter is, if there is one."""
    return f"\nadapter           {out / exporting.ADAPTER_FOLDER}" if recipe.export.adapter else ""


def _root(recipe_file: Path, root: Path | None) -> Path:
    return (root or recipe_file.parent).expanduser().resolve()


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)
