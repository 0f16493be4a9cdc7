"""Commands to begin with: an example that runs by itself."""

import dataclasses
from pathlib import Path

from rich.console import Console

from adamerge_jax.cli.command import Command
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
        from adamerge_jax.cli.commands import Learn
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


def _holds(file: Path, text: str) -> bool:
    """Returns True if a file is there and has a text in it."""
    return file.is_file() and file.read_bytes() == text.encode()
