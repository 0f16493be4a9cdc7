"""Weights as a sequence of shards: a thread writes one while the next one fills."""

import threading
from concurrent.futures import Executor, Future
from pathlib import Path

import jax
import numpy as np

from adamerge_jax.checkpoints.safetensors_file import WeightFile, write_tensors

MODEL_STEM = "model"
"""The beginning of the names of a model's weight files."""


class ShardWriter:
    """Writes tensors, in the order in which they are added, to files of a limited size.

    The tensors that are not yet written take the memory of one shard at most: `add` waits for the
    thread where they would take more.
    """

    def __init__(
        self, folder: Path, max_bytes: int, thread: Executor, stem: str = MODEL_STEM
    ) -> None:
        """Prepares to write; nothing is made until a shard is full.

        Args:
            folder: The folder of the files.
            max_bytes: The size of a file, exceeded only by one with a single tensor.
            thread: An executor with one worker; it must be shut down before the folder is moved.
            stem: The beginning of the names of the files.
        """
        self._stem = stem
        self.names: set[str] = set()
        self._folder = folder
        self._max_bytes = max_bytes
        self._thread = thread
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._leaving_bytes = 0
        self._room = threading.Condition()
        self._shards: list[Future[WeightFile]] = []

    def add(self, name: str, array: np.ndarray | jax.Array) -> None:
        """Adds a tensor, in its own dtype. It must not change until `finish` has returned.

        Raises:
            OSError: An earlier shard could not be written.
        """
        if name in self.names:
            raise ValueError(f"{name} was added twice")
        self.names.add(name)
        # An array's buffer is written as it lies in memory, so it must lie in C order.
        # (np.ascontiguousarray would make a vector of a scalar.)
        array = np.asarray(array, order="C")
        if self._pending and self._pending_bytes + array.nbytes > self._max_bytes:
            self._close_shard()
        self._wait_for_room(array.nbytes)
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def finish(self) -> list[WeightFile]:
        """Writes the last shard, waits for all and gives them their names."""
        if self._pending:
            self._close_shard()
        written = [shard.result() for shard in self._shards]
        count = len(written)
        files = []
        for number, shard in enumerate(written, start=1):
            is_whole = count == 1
            name = (
                f"{self._stem}.safetensors" if is_whole else shard_name(number, count, self._stem)
            )
            file = shard.file.rename(self._folder / name)
            files.append(WeightFile(file, shard.names, shard.values_of))
        return files

    def _wait_for_room(self, size: int) -> None:
        """Waits until the unwritten tensors and `size` bytes more take the memory of one shard."""
        with self._room:
            self._room.wait_for(
                lambda: (
                    not self._leaving_bytes
                    or self._leaving_bytes + self._pending_bytes + size <= self._max_bytes
                )
            )
        for shard in self._shards:
            if shard.done():
                shard.result()

    def _close_shard(self) -> None:
        file = self._folder / f"shard-{len(self._shards)}.safetensors"
        with self._room:
            self._leaving_bytes += self._pending_bytes
        self._shards.append(self._thread.submit(self._write, file, self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _write(self, file: Path, tensors: dict[str, np.ndarray]) -> WeightFile:
        """Writes a shard, in the thread, and forgets its tensors one by one."""
        unwritten_bytes = sum(array.nbytes for array in tensors.values())

        def release(size: int) -> None:
            nonlocal unwritten_bytes
            unwritten_bytes -= size
            with self._room:
                self._leaving_bytes -= size
                self._room.notify_all()

        try:
            return write_tensors(file, tensors, written=release)
        finally:
            # After an error too, or `add` would wait forever.
            release(unwritten_bytes)


def shard_name(number: int, count: int, stem: str = MODEL_STEM) -> str:
    """Returns the name of a shard, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
