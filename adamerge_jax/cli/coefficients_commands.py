"""Commands on coefficients files: what one says, what differs between two, other forms of it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from adamerge_jax.cli.command import (
    CoefficientsFile,
    Command,
    Invocation,
    RecipeCommand,
    to_type,
)
from adamerge_jax.errors import InputError, in_hand


@dataclasses.dataclass
class Inspect(Command):
    """Show what a coefficients file says.

    Of a run with evaluation.without_experts, also what each task loses without each expert.
    """

    answers = True

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run, or the run folder."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A .png file to draw the map of coefficients to."""

    def run(self, console: Console) -> None:
        """Prints the file's facts and mean coefficients, and draws them where asked to."""
        from adamerge_jax.coefficients.file import Coefficients, file_in
        from adamerge_jax.report.coefficients import print_coefficients
        from adamerge_jax.report.maps import draw_coefficients
        from adamerge_jax.report.plain_text import one_line
        from adamerge_jax.report.without_experts import Losses, losses_in_words, losses_table
        from adamerge_jax.runs.files import RESULTS_FILE, WITHOUT_EXPERTS_FILE
        from adamerge_jax.runs.results import read_results
        from adamerge_jax.runs.without_experts import read_without_experts

        out = _png_to_make(self.out)
        with in_hand(self.coefficients):
            coefficients = Coefficients.load(self.coefficients)
        if out is not None and coefficients.of_method_alone:
            raise InputError(
                f"--out {out}: {self.coefficients} has no coefficients to draw: the merge is that "
                f"of {coefficients.of_method_alone} alone; leave --out away"
            )
        print_coefficients(coefficients, console)
        folder = file_in(self.coefficients.expanduser()).parent
        rows = read_results(folder / RESULTS_FILE).rows
        merge = rows[-1] if rows else None
        without = read_without_experts(folder / WITHOUT_EXPERTS_FILE, merge)
        if merge is not None and without:
            losses = Losses.of(merge, without)
            console.print(losses_table(losses))
            words = one_line(losses_in_words(losses), longest=1000)
            console.print(words, highlight=False, soft_wrap=True)
        if out is not None:
            draw_coefficients(coefficients, out)
            console.print(f"map of coefficients {out}", highlight=False, soft_wrap=True)


def _png_to_make(path: Path | None) -> Path | None:
    """Returns the file to draw to; refuses one that is no PNG, or in no folder."""
    file = path and path.expanduser()
    if file is not None and (file.suffix != ".png" or not file.parent.is_dir()):
        raise InputError(f"--out {file}: expected a .png file in a folder that exists")
    return file


@dataclasses.dataclass
class Compare(Command):
    """Show what differs between two coefficients files: what, where, how much."""

    answers = True

    first: CoefficientsFile
    """A coefficients file, or a run folder."""
    second: CoefficientsFile
    """Another one; differences are this one's values less the first one's."""
    out: Path | None = None
    """A .png file to draw the map of differences to."""

    def run(self, console: Console) -> None:
        """Prints the differences, and draws them where asked to."""
        from adamerge_jax.coefficients.file import Coefficients, file_in
        from adamerge_jax.report.comparison import compare, print_comparison
        from adamerge_jax.report.maps import draw_comparison
        from adamerge_jax.report.plain_text import one_line
        from adamerge_jax.report.results import outcome_in_words
        from adamerge_jax.runs.files import RESULTS_FILE
        from adamerge_jax.runs.results import read_results

        out = _png_to_make(self.out)
        loaded = []
        for file in (self.first, self.second):
            with in_hand(file):
                loaded.append(Coefficients.load(file))
        comparison = compare(*loaded)
        print_comparison(comparison, console)
        for name, file in (("first", self.first), ("second", self.second)):
            results = read_results(file_in(file.expanduser()).parent / RESULTS_FILE)
            if results.rows:
                metric = results.rows[-1].metric
                words = outcome_in_words(results.outcome, metric, name=one_line)
                console.print(f"{name}: {words}", highlight=False, soft_wrap=True)
        if out is not None:
            draw_comparison(comparison, out)
            console.print(f"map of differences {out}", highlight=False, soft_wrap=True)


@dataclasses.dataclass(kw_only=True)
class Coarsen(RecipeCommand):
    """Replace coefficients of rows or chunks by fewer ones whose merge comes nearest.

    By least squares on the merged weights; says what is lost of the change from the base. Of
    coefficients by tensor mergekit and adapters can be made.
    """

    answers = True

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run, or the run folder."""
    granularity: Literal["tensor", "layer", "task"] = "tensor"
    """Parameters that are to share a coefficient."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Coefficients file to make."""

    def run(self, call: Invocation) -> None:
        """Writes the file, and says what it loses."""
        from adamerge_jax.pipeline.run_coarsen import coarsen_file

        coarsened = coarsen_file(
            self.coefficients,
            call.recipe,
            self.granularity,
            root=call.root,
            out=self.out,
            console=call.console,
        )
        worst = sorted(coarsened.losses, key=lambda loss: -loss.relative)[:_WORST]
        lines = [
            f"{loss.relative:7.1%}  {loss.name}" for loss in worst if loss.relative >= _NEGLIGIBLE
        ]
        if coarsened.coefficients.head_tensors:
            lines.append("heads stay those that were fitted to the finer merge")
        call.console.print(
            f"lost of the change from the base: {coarsened.relative:.1%} in all"
            f"{', most in' if lines else ''}",
            *lines,
            f"coefficients {self.out}",
            f"next         {to_type('fold', self.recipe_file, self.out, '--out', 'MERGED')}",
            sep="\n",
            highlight=False,
            soft_wrap=True,
        )


_WORST = 5
"""The number of tensors that are named."""

_NEGLIGIBLE = 0.0005


@dataclasses.dataclass(kw_only=True)
class Mergekit(RecipeCommand):
    """Write the merge of a coefficients file as a YAML file that mergekit makes it from."""

    coefficients: CoefficientsFile
    """The coefficients.safetensors of a run, or the run folder; of whole experts, one coefficient
    per tensor or coarser, no interference steps."""
    out: Path
    """YAML file to make."""

    def run(self, call: Invocation) -> None:
        """Writes the file, and says how to use it."""
        from adamerge_jax.pipeline.run_mergekit import write_mergekit

        write_mergekit(
            self.coefficients, call.recipe, root=call.root, out=self.out, console=call.console
        )
        call.console.print(f"run: mergekit-yaml {self.out} MERGED", soft_wrap=True)
