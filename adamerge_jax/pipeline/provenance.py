"""The origin of a merge: models and data of the Hugging Face Hub, and licences as found."""

from collections.abc import Iterable
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.data.tables import is_on_hub
from adamerge_jax.pipeline.models import Models, resolve
from adamerge_jax.recipes.schema import DataSource
from adamerge_jax.report.model_card import Origin


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
            on_hub=not Path(resolve(source.source, root)).is_dir(),
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
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):  # also a text that is no UTF-8
        return None
    license, name = card.data.get("license"), card.data.get("license_name")
    if license == "other" and isinstance(name, str):
        license = name
    return license if isinstance(license, str) and license else None
