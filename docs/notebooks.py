"""The notebooks as pages: their texts, code and outputs as the repository has them; none is run."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[1] / "notebooks"

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Codes by which a terminal's text has colours."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook, `notebooks/NAME.md`, and its pictures beside it."""
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        pictures: list[bytes] = []
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        page = "\n\n".join(block for cell in cells for block in _blocks(cell, notebook, pictures))
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=page))
        for number, picture in enumerate(pictures):
            name = f"notebooks/{_picture_name(notebook, number)}"
            files.append(File.generated(config, name, content=picture))
    return files


def _blocks(cell: dict[str, Any], notebook: Path, pictures: list[bytes]) -> Iterator[str]:
    """Yields the Markdown of a cell and its outputs; adds its pictures to those of the page."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![picture {len(pictures) + 1}]({_picture_name(notebook, len(pictures))})"
            pictures.append(base64.b64decode(data["image/png"]))
        elif text := "".join(data.get("text/plain", output.get("text", ""))):
            yield f"```text\n{_COLOURS.sub('', text).strip()}\n```"


def _picture_name(notebook: Path, number: int) -> str:
    return f"{notebook.stem}-{number}.png"
