"""The time that a step takes to read task vectors, from wherever they lie."""

from typing import NamedTuple

import numpy as np

from adamerge_jax.mixing import is_summed_once
from adamerge_jax.plan.hardware import DISK, Device
from adamerge_jax.plan.outline import Outline, streamed_bytes
from adamerge_jax.plan.work import bytes_of


class Mixing(NamedTuple):
    """The way in which a step mixes weights.

    Attributes:
        delta_bytes: The bytes of the task vectors that are read from where they lie.
        weights: The number of merged parameters.
        place: The place of the task vectors: `device`, `host` or `disk`.
        parts: The number of microbatches.
        once: True if these share one mix.
        recomputed: True if the backward pass mixes again.
    """

    delta_bytes: int
    weights: int
    place: str
    parts: int
    once: bool
    recomputed: bool

    @classmethod
    def of(cls, outline: Outline) -> "Mixing":
        """Returns the mixing of an outline's step."""
        place = outline.recipe.task_vectors.memory
        size = bytes_of if place == "device" else streamed_bytes
        summed = {name: delta for name, delta in outline.deltas.items() if is_summed_once(delta)}
        return cls(
            sum(size(delta) for delta in summed.values()),
            sum(int(np.prod(outline.base[name].shape)) for name in summed),
            place,
            outline.method.microbatches,
            outline.method.mixes_once,
            outline.recipe.learning.rematerialize != "nothing",
        )

    @property
    def reads(self) -> int:
        """The number of times that a step reads all task vectors."""
        return 2 if self.once else (2 + self.recomputed) * self.parts

    def seconds(self, device: Device, devices: int = 1) -> float:
        """Returns the time that the reading takes, and the sums of gradients.

        Args:
            device: The device.
            devices: The number of devices among which the work is split.
        """
        bandwidth = device.bandwidth * device.attainable * devices
        rate = {"device": bandwidth, "host": device.link, "disk": DISK}[self.place]
        # A part's gradient and the sum are read, and the sum is written.
        summed = 3 * 4 * self.weights * self.parts if self.once else 0
        return self.reads * self.delta_bytes / rate + summed / bandwidth
