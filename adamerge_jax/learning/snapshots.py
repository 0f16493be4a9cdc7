"""The last state of something that runs for long, so that it can go on after it was killed."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from adamerge_jax.checkpoints.safetensors_file import STORED_DTYPES
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.writing import write_whole

_FILE = "snapshot.safetensors"


def save_snapshot(folder: Path, step: int, tree: PyTree) -> None:
    """Writes a snapshot; it is complete before the one before it is gone.

    Args:
        folder: The folder of the snapshot, made if it is not there.
        step: The number of steps taken.
        tree: Arrays that this process has as a whole, and numbers.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in _by_path(jax.device_get(tree)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _FILE, save(arrays, metadata={"step": str(step)}))


def load_snapshot(folder: Path, like: PyTree) -> PyTree | None:
    """Reads the last snapshot, bit for bit.

    Args:
        folder: The folder of the snapshot.
        like: A tree of the same structure. Where it has a Python number, a number is returned,
            elsewhere a NumPy array.

    Returns:
        The tree; None where there is no snapshot.

    Raises:
        InputError: The snapshot cannot be read, or is of another structure.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    try:
        entries = dict(deserialize(file.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read: {in_one_line(error)}; remove the run folder and start again"
        ) from error
    leaves = _by_path(like)
    if leaves.keys() != entries.keys():
        raise InputError(
            f"{folder} holds the state of something else, or of another version of this "
            "program; remove the run folder and start again"
        )
    restored = []
    for name, leaf in leaves.items():
        entry = entries[name]
        array = np.frombuffer(entry["data"], STORED_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        restored.append(array.item() if isinstance(leaf, bool | int | float) else array)
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def last_step(folder: Path) -> int | None:
    """Returns the step of the snapshot in a folder, or None where there is none."""
    file = folder / _FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as snapshot:
            return int(snapshot.metadata()["step"])
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read: {in_one_line(error)}; remove the run folder and start again"
        ) from error


def _by_path(tree: PyTree) -> dict[str, PyTree]:
    """Returns the leaves of a tree by their paths in it, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
