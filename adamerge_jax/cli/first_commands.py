"""Commands to begin with: an example that runs by itself, a first recipe, the form of recipes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from adamerge_jax.cli.command import Command, to_type
from adamerge_jax.errors import InputError


@dataclasses.dataclass
class Quickstart(Command):
    """Train four small experts on handwritten digits and merge them: the whole path, in minutes.

    Needs no network. The same command goes on where it was stopped, once the experts are there.
    """

    out: Path = Path("quickstart")
    """Folder to make: base, experts, data, recipe and the run."""
    seed: int = 0
    """Seed of all training, and of the recipe."""

    def run(self, console: Console) -> None:
        """Trains the experts where they are not there yet, then runs `adamerge learn`."""
        from adamerge_jax.cli.recipe_commands import Learn
        from adamerge_jax.cli.recipe_options import parse_with_recipe
        from adamerge_jax.quickstart import prepare, recipe_text

        if self.seed < 0:
            raise InputError(f"--seed: found {self.seed}, expected 0 or more")
        folder = self.out.expanduser()
        recipe = folder / "recipe.yaml"
        if not _holds(recipe, recipe_text(self.seed)):
            prepare(folder, self.seed, console)
        options = [str(recipe), "--out", str(folder / "run"), "--resume"]
        parse_with_recipe("learn", Learn, options).run(console)


@dataclasses.dataclass(kw_only=True)
class New(Command):
    """Write a commented recipe for a base and its experts, with the data that lie near them.

    Finds the kind of the models, names of tasks, columns of data and the tokenizer. Opens the
    models without reading their weights; learns nothing.
    """

    answers = True

    base: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BASE")]
    """The base's folder, or its name on the Hub."""
    experts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="EXPERT")]
    """The experts' folders or names, or one folder that holds all of them."""
    data: tuple[str, ...] = ()
    """Files and folders of data, found by the tasks' names in theirs, or TASK=PATH. By default the
    folder data/ beside the models."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("recipe.yaml")
    """The recipe to write."""
    force: bool = False
    """Write the recipe in place of one that is there."""

    def run(self, console: Console) -> None:
        """Writes the recipe, and says what was found and how to go on."""
        from adamerge_jax.drafting.draft import draft_recipe
        from adamerge_jax.files.writing import write_whole

        if not self.experts:
            raise InputError("adamerge new: give the experts behind the base")
        out = _recipe_to_write(self.out, force=self.force)
        draft = draft_recipe(self.base, self.experts, self.data, out)
        write_whole(out, draft.text)
        for note in draft.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        command = ["learn", out] if draft.learns else ["merge", out, *_TIES]
        console.print(
            f"recipe  {out}: task{'s' * (len(draft.tasks) > 1)} {', '.join(draft.tasks)}"
            f"{f' of a {draft.kind}' if draft.kind else ''}\n"
            f"next    {to_type(*command)}",
            highlight=False,
            soft_wrap=True,
        )


@dataclasses.dataclass(kw_only=True)
class FromMergekit(Command):
    """Write a recipe for the models of a mergekit file, and say what makes the same merge.

    Opens the models without reading their weights; merges nothing. Data that lie near the models
    are found as by `adamerge new`.
    """

    answers = True

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MERGEKIT_YAML")]
    """The file of mergekit."""
    data: tuple[str, ...] = ()
    """Files and folders of data, found by the tasks' names in theirs, or TASK=PATH. By default the
    folder data/ beside the models."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("recipe.yaml")
    """The recipe to write."""
    force: bool = False
    """Write the recipe in place of one that is there."""

    def run(self, console: Console) -> None:
        """Writes the recipe, and prints the command that makes the same merge."""
        from adamerge_jax.drafting.draft import draft_recipe
        from adamerge_jax.drafting.mergekit_file import read_mergekit_file
        from adamerge_jax.files.writing import write_whole

        out = _recipe_to_write(self.out, force=self.force)
        file = self.file.expanduser()
        merge = read_mergekit_file(file)
        start = None if merge.method else str(file.absolute())
        draft = draft_recipe(
            merge.base, merge.experts, self.data, out, start=start, dtype=merge.dtype
        )
        write_whole(out, draft.text)
        for note in (*merge.notes, *draft.notes):
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        options = json.dumps(merge.options).replace('"', "")
        command: list[str | Path] = ["learn", out]
        if merge.method:
            command = ["merge", out, "--method", merge.method, "--options", options]
            command += ["--out", "merged"]
        console.print(
            f"recipe  {out}: task{'s' * (len(draft.tasks) > 1)} {', '.join(draft.tasks)}\n"
            f"next    {to_type(*command)}",
            highlight=False,
            soft_wrap=True,
        )


_TIES = ("--method", "ties", "--out", "merged")
"""The options of a merge without learning that a new recipe's line proposes."""


def _recipe_to_write(path: Path, *, force: bool) -> Path:
    """Returns the file of a new recipe; refuses one that is there, or in no folder."""
    out = path.expanduser()
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        raise InputError(f"--out {out}: expected a .yaml file in a folder that exists")
    if out.exists() and not (force and out.is_file()):
        raise InputError(f"{out} is there already; give another --out, or --force to replace it")
    return out


@dataclasses.dataclass
class Schema(Command):
    """Print the JSON schema of recipes, with which editors complete fields and mark mistakes.

    Write it beside recipes: adamerge schema > recipe.schema.json
    """

    answers = True

    def run(self, console: Console) -> None:
        """Prints the schema."""
        from adamerge_jax.recipes.json_schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))  # no line of it may be cut by the console


def _holds(file: Path, text: str) -> bool:
    """Returns True if a file is there and has a text in it."""
    return file.is_file() and file.read_bytes() == text.encode()
