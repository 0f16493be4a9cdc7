"""The last state of something that runs for long, so that it can go on after it was killed."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from adamerge_jax.errors import InputError, in_one_line


class Snapshots:
    """A folder with the last snapshot of a tree of small arrays.

    A new snapshot is complete before the one before it is removed: whenever the process is killed,
    there is one to go on from. In Orbax's format it is one flat array of each dtype, because Orbax
    takes its time for every array rather than for every byte.
    """

    def __init__(self, folder: Path):
        """Opens the folder; it is made with the first snapshot.

        Args:
            folder: May hold a snapshot of an earlier process and what is left of an unfinished one.
        """
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, tree: PyTree) -> None:
        """Keeps a tree, and removes the one kept before.

        Args:
            step: After the step of the snapshot before.
            tree: Arrays that this process has as a whole, and numbers.
        """
        leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
        index, by_dtype = [], {}
        for path, leaf in leaves:
            array = np.asarray(leaf)
            index.append([jax.tree_util.keystr(path), array.dtype.name, array.shape])
            by_dtype.setdefault(array.dtype.name, []).append(array.ravel())
        arrays = {name: np.concatenate(parts) for name, parts in by_dtype.items()}
        # Orbax's arrays have no booleans.
        content = {name: array.view(np.uint8) for name, array in arrays.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(content), index=ocp.args.JsonSave(index)
            ),
        )

    def load(self, like: PyTree) -> PyTree | None:
        """The last snapshot, bit for bit; None where there is none.

        Args:
            like: A tree of the same structure. Where it has a Python number, a number is returned,
                elsewhere a NumPy array.

        Raises:
            InputError: The snapshot cannot be read, or is of another structure.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(), index=ocp.args.JsonRestore()
                ),
            )
        except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise InputError(
                f"{self._folder} cannot be read: {in_one_line(error)}; remove the run folder and "
                "start again"
            ) from error
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        if [jax.tree_util.keystr(path) for path, _ in leaves] != [name for name, *_ in found.index]:
            raise InputError(
                f"{self._folder} holds the state of something else, or of another version of this "
                "program; remove the run folder and start again"
            )
        position, restored = dict.fromkeys(found.arrays, 0), []
        for (_, name, shape), (_, leaf) in zip(found.index, leaves, strict=True):
            start, dtype = position[name], np.dtype(name)
            position[name] += int(np.prod(shape)) * dtype.itemsize
            content = np.asarray(found.arrays[name])[start : position[name]]
            array = content.view(dtype).reshape(shape)
            restored.append(array.item() if isinstance(leaf, bool | int | float) else array)
        return jax.tree_util.tree_unflatten(structure, restored)

    def close(self) -> None:
        """Frees what Orbax holds open."""
        self._manager.close()


def last_step(folder: Path) -> int | None:
    """Step of the last snapshot in a folder of `Snapshots`, or None where there is none.

    Looks at nothing else, and one process alone may call it.
    """
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    return max(steps, default=None)
