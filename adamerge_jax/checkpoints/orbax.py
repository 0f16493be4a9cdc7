"""Parameters as an Orbax checkpoint, for further work in JAX.

It is a flat dictionary: the keys are the parameters' names, dots and `*` included.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from adamerge_jax.checkpoints.folders import new_folder
from adamerge_jax.errors import InputError, in_one_line

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


@dataclass(frozen=True)
class UnreadArray:
    """An array that is read just before it is written, so that not all arrays exist at once.

    Attributes:
        shape: The array's shape.
        dtype: The array's dtype.
        read: Reads the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def require_plain_path(folder: Path) -> None:
    """Refuses a folder that Orbax cannot write to: it treats paths as patterns.

    Raises:
        InputError: The path has a `*`, `?` or `[`.
    """
    if glob.has_magic(str(folder.absolute())):
        raise InputError(
            f"{folder.absolute()} has one of the characters * ? [ in its path, with which Orbax "
            "writes nothing that can be read; choose another folder"
        )


def save_parameters(folder: str | Path, parameters: Mapping[str, jax.Array | UnreadArray]) -> None:
    """Writes parameters; the folder appears when it is complete.

    If there are several processes, all must call this, and each writes its part.

    Args:
        folder: The folder to make; it may exist if it is empty.
        parameters: Arrays by name, such as `bert.encoder.layer.*.output.dense.weight`.

    Raises:
        InputError: The folder is in use, cannot be made or has no plain path, or the disk becomes
            full.
    """
    require_plain_path(Path(folder))
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        # Orbax has the processes agree on a temporary name of its own.
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder).expanduser().resolve(), dict(parameters))
        return
    with new_folder(folder) as partial:
        # One level down, so that the files that Orbax keeps beside it are removed on failure too.
        target = partial / "parameters"
        with _checkpointer() as checkpointer:
            checkpointer.save(target, dict(parameters))
        for entry in target.iterdir():
            entry.rename(partial / entry.name)
        target.rmdir()


def load_parameters(folder: str | Path) -> dict[str, jax.Array]:
    """Reads parameters that `save_parameters` wrote, to the first device of this machine.

    Args:
        folder: The folder that `save_parameters` made.

    Returns:
        The arrays by name, each in the dtype that it was saved in.

    Raises:
        InputError: There is no such folder, or no complete checkpoint of this kind in it.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise InputError(f"no such folder: {folder}; give one that save_parameters wrote")
    # The device is given, because Orbax would ask for the devices that the arrays came from.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(path).item_metadata.tree
            target = {
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
                for name, array in saved.items()
            }
            return checkpointer.restore(path, target)
        # A missing file, broken metadata and arrays in another structure all end up here.
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise InputError(
                f"{folder} is not a complete checkpoint of parameters: {in_one_line(error)}; give "
                "a folder that save_parameters wrote"
            ) from error


def _checkpointer() -> ocp.Checkpointer:
    """Returns a writer of what Orbax's own checkpointers read.

    Weights are not compressed, as they hardly get smaller.
    """
    import orbax.checkpoint as ocp

    class UnreadArrayHandler(ocp.type_handlers.NumpyHandler):
        """Writes arrays one after the other, each read when the last one is written."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)

        async def serialize(
            self,
            values: Sequence[UnreadArray],
            infos: Sequence[ocp.type_handlers.ParamInfo],
            args: Sequence[ocp.SaveArgs] | None = None,
        ) -> Sequence[ocp.future.Future]:
            for position, unread in enumerate(values):
                arguments = args and [args[position]]
                for written in await super().serialize(
                    [unread.read()], [infos[position]], arguments
                ):
                    written.result()
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (UnreadArray, UnreadArrayHandler())
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    )
