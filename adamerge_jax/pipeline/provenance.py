"""The origin of a merge: models and data of the Hugging Face Hub, and licences as found."""

import re
from collections.abc import Iterable
from pathlib import Path

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.data.locations import is_on_hub
from adamerge_jax.files.strict_yaml import read_yaml
from adamerge_jax.pipeline.located import resolve
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.schema import DataSource
from adamerge_jax.report.model_card import Origin

_LONGEST_METADATA = 100_000
"""The number of characters of a model card that are searched for its metadata."""


def model_origins(models: Models, root: Path) -> list[Origin]:
    """Returns the origins of the base and of the experts, the base first.

    Args:
        models: The base and its experts.
        root: Folder that relative paths of the recipe start from.
    """
    opened = [model.checkpoint for model in (models.base, *models.experts.values())]
    return [
        Origin(
            source.name,
            source.source,
            source.revision,
            on_hub=not Path(resolve(source.source, root)).exists(),
            license=_license(checkpoint),
        )
        for source, checkpoint in zip(models.sources, opened, strict=True)
    ]


def hub_datasets(sources: Iterable[DataSource], root: Path) -> list[str]:
    """Returns the Hub ids among the sources of data, sorted.

    Args:
        sources: The sources of data.
        root: Folder that relative paths start from.
    """
    return sorted({source.path for source in sources if is_on_hub(source, root)})


def _license(checkpoint: Checkpoint) -> str | None:
    """Returns the licence in the metadata of a checkpoint's README.md; None if none is readable."""
    file = checkpoint.folder / "README.md"
    if not file.is_file():
        return None
    # Anybody's text, read when all of learning is done: whatever it is, it must not end the run.
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(_LONGEST_METADATA)
        metadata = re.match(r"\s*---\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        fields = read_yaml(metadata[1]) if metadata else None
    except (OSError, ValueError, RecursionError):  # also no UTF-8, and an InputError of YAML
        return None
    if not isinstance(fields, dict):
        return None
    license, name = fields.get("license"), fields.get("license_name")
    if license == "other" and isinstance(name, str):
        license = name
    return license if isinstance(license, str) and license else None
