"""Commands on the folder of a run that has ended: its report, and its way to others."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from adamerge_jax.cli.command import Command
from adamerge_jax.errors import in_hand

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


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


@dataclasses.dataclass(kw_only=True)
class Push(Command):
    """Upload a merge to the Hugging Face Hub: checkpoint, card with scores, coefficients, recipe.

    Without a token on this machine (`hf auth login`, or HF_TOKEN) it only lists the files.
    """

    answers = True

    folder: RunFolder
    """The folder that `learn`, `search`, `merge` or `fold` has written."""
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """The model on the Hub; it is made if it is not there."""
    private: bool = True
    """Make a model that only its owners see."""
    dry_run: bool = False
    """List the files that would be uploaded, and upload nothing."""
    force: bool = False
    """Write into a model that has files already."""

    def run(self, console: Console) -> None:
        """Lists the files, then uploads them where it may."""
        from huggingface_hub import get_token

        from adamerge_jax.checkpoints.folders import readable_size
        from adamerge_jax.publishing.push import plan_upload, push

        upload = plan_upload(self.folder.expanduser(), self.repository)
        lines = [f"{readable_size(file.size):>10}  {file.name}" for file in upload.files]
        lines += [f"note: {note}" for note in upload.notes]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
        total = f"{len(upload.files)} files, {readable_size(upload.size)}"
        if self.dry_run or get_token() is None:
            reason = "" if self.dry_run else "; log in first: hf auth login, or set HF_TOKEN"
            ending = f"nothing was uploaded ({total} for {self.repository}){reason}"
        else:
            address = push(upload, private=self.private, force=self.force)
            ending = f"uploaded {total} to {address}"
        console.print(ending, highlight=False, soft_wrap=True)
