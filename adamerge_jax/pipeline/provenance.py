"""Where a merge comes from: models and data of the Hugging Face Hub, and licences as found."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.data.tables import is_on_hub
from adamerge_jax.pipeline.models import Models, resolve
from adamerge_jax.recipes.schema import Recipe


class Origin(NamedTuple):
    """A model that a merge was made of.

    Attributes:
        name: `base`, or the task of an expert.
        source: The folder or Hub id as the recipe gives it.
        revision: The Hub revision asked for, if any.
        on_hub: Whether it is a Hub id.
        license: The licence that its own model card names, or None where none is named.
    """

    name: str
    source: str
    revision: str | None
    on_hub: bool
    license: str | None


def model_origins(models: Models, root: Path) -> list[Origin]:
    """Where the base and the experts come from, the base first.

    Args:
        models: The base and its experts.
        root: Folder that relative paths of the recipe start from.
    """
    opened = [models.base.checkpoint, *(own.checkpoint for own in models.experts.values())]
    return [
        Origin(
            source.name,
            source.source,
            source.revision,
            on_hub=not Path(resolve(source.source, root)).is_dir(),
            license=_license(checkpoint),
        )
        for source, checkpoint in zip(models.sources, opened, strict=True)
    ]


def shared_license(origins: Sequence[Origin]) -> str | None:
    """The licence of all the models together, as the Hub names licences.

    Returns:
        Theirs where all name the same; `other` where they name different ones; None where one
        names none: what holds for the merge is then for its owner to find out.
    """
    found = {origin.license for origin in origins}
    if None in found:
        return None
    return found.pop() if len(found) == 1 else "other"


def hub_datasets(recipe: Recipe, root: Path) -> list[str]:
    """Hub ids of the data sets that coefficients are learned from.

    Args:
        recipe: Names the data.
        root: Folder that relative paths start from.
    """
    sources = [task.calibration for task in recipe.tasks.values()]
    return sorted({source.path for source in sources if is_on_hub(source, root)})


def _license(checkpoint: Checkpoint) -> str | None:
    """The licence in the metadata of a checkpoint's README.md, if there is one that can be read."""
    file = checkpoint.folder / "README.md"
    if not file.is_file():
        return None
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):  # also a text that is no UTF-8
        return None
    license, name = card.data.license, card.data.get("license_name")
    if license == "other" and isinstance(name, str):
        license = name
    return license if isinstance(license, str) and license else None
