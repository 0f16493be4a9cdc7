"""Opening a checkpoint of any kind."""

from pathlib import Path

from adamerge_jax.checkpoints.diffusion import (
    is_component,
    open_component,
    open_pipeline,
    refuse_pipeline_adapter,
)
from adamerge_jax.checkpoints.gguf_model import open_gguf
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.pipeline_index import is_pipeline


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """Opens a model or a diffusion pipeline: a folder, or a checkpoint of the Hub.

    Args:
        source: A folder or a Hub name, as for `locate`.
        revision: A branch, tag or commit of a Hub checkpoint.

    Raises:
        InputError: There is no such checkpoint, or it is incomplete, corrupt or pickled.
    """
    return open_in_folder(source, locate(source, revision=revision))


def open_in_folder(source: str, folder: Path) -> Checkpoint:
    """Opens a model or a diffusion pipeline in a folder, or a GGUF file, that `locate` returned.

    Args:
        source: The folder, file or Hub name, as the user wrote it.
        folder: The folder of its files, or the GGUF file.

    Raises:
        InputError: It is incomplete, corrupt or pickled.
    """
    if folder.is_file():
        return open_gguf(source, folder)
    if is_pipeline(folder):
        return open_pipeline(source, folder)
    if is_component(folder):
        return open_component(source, folder)
    refuse_pipeline_adapter(folder)
    return Checkpoint.in_folder(source, folder)
