"""Writing a diffusion pipeline: merged components, and copies of the rest.

Weights are written without a variant in their names, so that they are what is loaded by default.
No Python file is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

from adamerge_jax.checkpoints.assets import copy_file, require_of_folder
from adamerge_jax.checkpoints.config_export import without_old_weights
from adamerge_jax.checkpoints.config_file import CONFIG_FILE
from adamerge_jax.checkpoints.diffusion import Pipeline, component_of
from adamerge_jax.checkpoints.folders import new_folder
from adamerge_jax.checkpoints.huggingface_export import write_config, write_index
from adamerge_jax.checkpoints.pipeline_index import COPIED, PIPELINE_FILE
from adamerge_jax.checkpoints.shards import ShardWriter
from adamerge_jax.files.json_object import write_json


def write_pipeline(
    folder: Path,
    base: Pipeline,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int,
    expected_bytes: int,
    texts: dict[str, str],
) -> None:
    """Writes a pipeline that `DiffusionPipeline.from_pretrained` reads.

    Args:
        folder: The folder to make; after an error or an interrupt there is none.
        base: The pipeline whose settings it has.
        tensors: All tensors by name, those of a component one after the other.
        max_shard_bytes: The size of a weight file, exceeded only by one with a single tensor.
        expected_bytes: The size of all files, to check first that the disk has room for it.
        texts: Text files beside the components, by name.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is or becomes full.
    """
    with new_folder(folder, expected_bytes=expected_bytes) as partial:
        for file in copied_files(base):
            copy_file(file, base.folder, partial)
        # The thread of each component has ended when the folder is renamed or removed.
        for name, group in groupby(tensors, lambda item: component_of(item[0])):
            component = base.components[name]
            part = partial / name if base.is_whole else partial
            part.mkdir(exist_ok=True)
            with ThreadPoolExecutor(1) as thread:
                writer = ShardWriter(part, max_shard_bytes, thread, component.stem)
                for tensor, array in group:
                    writer.add(tensor.partition(".")[2], array)
                files = writer.finish()
            if len(files) > 1:
                write_index(part / f"{component.stem}.safetensors.index.json", files)
            fields = without_old_weights(component.fields)
            if "_class_name" in fields:  # of diffusers, whose configs name no dtype
                write_json(part / CONFIG_FILE, fields)
            else:
                write_config(part, fields, files)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def copied_files(base: Pipeline) -> Iterator[Path]:
    """Yields the files of a pipeline that its merge has too.

    Raises:
        InputError: One is a link out of the pipeline's folder.
    """
    if base.is_whole:
        yield base.folder / PIPELINE_FILE
    for name in base.copied:
        for file in sorted((base.folder / name).iterdir()):
            if file.suffix in COPIED and file.is_file():
                require_of_folder(file, base.folder)
                yield file
