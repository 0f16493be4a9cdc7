"""The `adamerge` command: parsing, and the one place where an error becomes an exit status."""

import inspect
import os
import select
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, Protocol

import tyro
from rich.console import Console

from adamerge_jax.cli.allocation import keep_freed_memory
from adamerge_jax.cli.command import Command, RecipeCommand
from adamerge_jax.cli.commands import COMMANDS, GROUPS
from adamerge_jax.cli.console import make_console, show_log_lines
from adamerge_jax.cli.garbage import leave_garbage_at_exit, uncollected
from adamerge_jax.cli.last_catch import explain
from adamerge_jax.errors import InputError, NonFiniteObjectiveError, readable
from adamerge_jax.runs.invocation import COMMAND
from adamerge_jax.stopping import Stopped, stop_on_signals

_DESCRIPTION = "Merge fine-tuned experts of one base model into one checkpoint."

_ENDING = (
    "adamerge COMMAND --help tells the options of a command, adamerge --version the version; "
    "adamerge --completion bash prints a script for completion in the shell."
)


_SHELLS = ("bash", "zsh", "tcsh")

_BROKEN_PIPE = 128 + 13
"""The exit status of a process that SIGPIPE ended."""


class Invocable(Protocol):
    """A parsed command line."""

    @property
    def common_options(self) -> Command:
        """The options of all commands."""

    @property
    def run_folder(self) -> Path | None:
        """The run folder that the command writes to, if it does."""

    def run(self, console: Console) -> None:
        """Runs the command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends in one line on standard error and exit status 2.

    Ctrl-C and SIGTERM end it with 130 and 143, and with the command to go on with. What nobody
    foresaw is explained in one line, too; its traceback is in a file.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"adamerge_jax {version('adamerge_jax')}")
        return
    command = None
    leave_garbage_at_exit()
    keep_freed_memory()
    try:
        with stop_on_signals():
            with uncollected():
                command = parse(given)
            COMMAND.set(shlex.join(["adamerge", *given]))
            run(command)
    except InputError as error:
        _exit(f"error: {error}", 2)
    except NonFiniteObjectiveError as error:
        hint = "; the run folder keeps the last good coefficients" if error.learned else ""
        _exit(f"error: {error}{hint}", 1)
    except Stopped as stopped:
        _exit(f"{stopped}; {_how_to_go_on(given)}", stopped.exit_status)
    except KeyboardInterrupt:  # outside of the main thread, or before signals were handled
        _exit(f"{Stopped()}; {_how_to_go_on(given)}", Stopped().exit_status)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            sys.exit(_BROKEN_PIPE)
        _exit(*explain(error, None if command is None else command.run_folder))


def run(command: Invocable) -> None:
    """Runs a parsed command line, on one console for progress, results and log lines."""
    options = command.common_options
    console = make_console(quiet=options.quiet and not options.answers)
    show_log_lines(console, verbose=options.verbose)
    command.run(console)


def learn(arguments: Sequence[str] | None = None) -> None:
    """Runs `adamerge learn`, for launchers."""
    main(["learn", *(sys.argv[1:] if arguments is None else arguments)])


def parse(arguments: Sequence[str]) -> Invocable:
    """Parses the command line.

    Raises:
        InputError: There is no such command, or its recipe cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        _print_commands()
        sys.exit(0)
    name, *options = arguments
    if name == "--completion":
        _print_completion(options)
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; the commands are {', '.join(COMMANDS)}")
    if not issubclass(COMMANDS[name], RecipeCommand):
        options = ["--help" if option == "--help-all" else option for option in options]
        return tyro.cli(COMMANDS[name], args=options, prog=f"adamerge {name}")
    from adamerge_jax.cli.recipe_options import parse_with_recipe

    return parse_with_recipe(name, COMMANDS[name], options)


def _print_commands() -> None:
    """Prints the commands in their groups, with the first line of what each does."""
    width = min(shutil.get_terminal_size().columns, 100)
    indent = max(map(len, COMMANDS)) + 4
    print(f"usage: adamerge COMMAND ...\n\n{textwrap.fill(_DESCRIPTION, width)}")
    for heading, commands in GROUPS.items():
        print(f"\n{heading}")
        for name, command in commands.items():
            does = inspect.getdoc(command).partition("\n\n")[0]
            lead = f"  {name}".ljust(indent)
            print(textwrap.fill(does, width, initial_indent=lead, subsequent_indent=" " * indent))
    print(f"\n{textwrap.fill(_ENDING, width)}")


def _print_completion(arguments: Sequence[str]) -> NoReturn:
    """Prints the script with which a shell completes commands and their options, and ends.

    Raises:
        InputError: Another shell is asked for, or none.
    """
    if len(arguments) != 1 or arguments[0] not in _SHELLS:
        raise InputError(f"--completion: give one of {', '.join(_SHELLS)}")
    asked = ["--tyro-print-completion", *arguments]
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="adamerge", args=asked)
    sys.exit(0)


def _how_to_go_on(arguments: Sequence[str]) -> str:
    """Returns the command that goes on with one that was stopped."""
    again = ["adamerge", *arguments]
    if arguments[0] in ("quickstart", "compare-methods"):
        return f"the same command goes on: {shlex.join(again)}"
    if arguments[0] not in ("learn", "search", "front"):
        return f"the same command starts anew: {shlex.join(again)}"
    if "--resume" not in again:
        again.append("--resume")
    return f"go on with: {shlex.join(again)}"


def _is_output_closed() -> bool:
    """Returns True if nobody reads standard output any more, as behind `| head`.

    Python would complain again when it ends, and so what is left is written nowhere.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return is_closed


def _exit(message: str, status: int) -> NoReturn:
    print(readable(message), file=sys.stderr)
    sys.exit(status)
