"""A command, and what a command with a recipe gets: the bases of all commands."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import Recipe


CoefficientsFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="COEFFICIENTS")]


def to_type(*words: str | Path) -> str:
    """Returns a command of ours as it is to be typed.

    Args:
        words: All behind `adamerge`.
    """
    return shlex.join(["adamerge", *map(str, words)])


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
    """Run the code of somebody's own that the recipe names: package.module:function, and tasks in
    evaluation.lm_eval.include_path."""

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
