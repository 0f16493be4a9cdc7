"""The `adamerge` command: parsing, and the one place where an error becomes an exit status."""

import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import tyro
from rich.console import Console

from adamerge_jax.cli.commands import COMMANDS, RecipeCommand
from adamerge_jax.cli.console import make_console
from adamerge_jax.errors import InputError, NonFiniteObjectiveError

_DESCRIPTION = "Merge fine-tuned experts of one base model into one checkpoint."


class Command(Protocol):
    """A parsed command line."""

    def run(self, console: Console) -> None:
        """Runs the command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends in one line on standard error and exit status 2."""
    try:
        parse(sys.argv[1:] if arguments is None else arguments).run(make_console())
    except InputError as error:
        _exit(f"error: {error}", 2)
    except NonFiniteObjectiveError as error:
        hint = "; the run folder keeps the last good coefficients" if error.learned else ""
        _exit(f"error: {error}{hint}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def learn(arguments: Sequence[str] | None = None) -> None:
    """Runs `adamerge learn`, for launchers."""
    main(["learn", *(sys.argv[1:] if arguments is None else arguments)])


def parse(arguments: Sequence[str]) -> Command:
    """Parses the command line.

    Raises:
        InputError: There is no such command, or its recipe cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="adamerge", description=_DESCRIPTION, args=["--help"]
        )
    name, *options = arguments
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; the commands are {', '.join(COMMANDS)}")
    if not issubclass(COMMANDS[name], RecipeCommand):
        return tyro.cli(COMMANDS[name], args=options, prog=f"adamerge {name}")
    from adamerge_jax.cli.recipe_options import parse_with_recipe

    return parse_with_recipe(name, COMMANDS[name], options)


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)
