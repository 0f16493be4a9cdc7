"""What accelerators can do: their makers' published figures, and a quick measurement of a CPU.

Figures are of one device, dense (no structured sparsity):

- `h100` and `a100` (SXM, 80 GB), `h200`, `l4`: NVIDIA's datasheets of these Tensor Core GPUs.
- `tpu-v4`, `tpu-v5e`, `tpu-v5p`, `tpu-v6e`: Google Cloud TPU documentation, one page a version.

float32 is what JAX multiplies float32 matrices with by default there: TF32 on NVIDIA's, one pass of
bfloat16 on TPUs.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamerge_jax.errors import InputError


class Device(NamedTuple):
    """What a device can do.

    Attributes:
        name: As the table shows it.
        flops: Floating-point operations per second of matrix products, by dtype.
        bandwidth: Of its memory, in bytes per second.
        memory: In bytes.
        attainable: Part of these that a step is taken to reach: 1 where they were measured.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: int
    attainable: float

    @property
    def is_cpu(self) -> bool:
        """Whether its memory is the host's."""
        return self.attainable == 1.0


ATTAINABLE = 0.4
"""Part of a published peak that a step is taken to reach: an assumption, not a measurement."""


def _published(name: str, half: float, single: float, bandwidth: float, gigabytes: float) -> Device:
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, flops, bandwidth * 1e9, int(gigabytes * 1e9), ATTAINABLE)


DEVICES = {
    "h100": _published("NVIDIA H100 SXM", 989, 494, 3350, 80),
    "h200": _published("NVIDIA H200 SXM", 989, 494, 4800, 141),
    "a100": _published("NVIDIA A100 SXM 80 GB", 312, 156, 2039, 80),
    "l4": _published("NVIDIA L4", 121, 60, 300, 24),
    "tpu-v4": _published("TPU v4", 275, 275, 1228, 32 * 1.0737),
    "tpu-v5e": _published("TPU v5e", 197, 197, 819, 16 * 1.0737),
    "tpu-v5p": _published("TPU v5p", 459, 459, 2765, 95 * 1.0737),
    "tpu-v6e": _published("TPU v6e", 918, 918, 1640, 32 * 1.0737),
}
"""Devices by their names on the command line."""


def find_device(name: str | None) -> Device:
    """A device of the table, this machine's processor (`cpu`), or the present device.

    Raises:
        InputError: There is no such device.
    """
    if name is None:
        present = jax.devices()[0]
        if present.platform == "cpu":
            return measure_cpu()
        kind = present.device_kind.lower().replace(" ", "")
        found = next((key for key in DEVICES if key.replace("tpu-", "tpu") in kind), None)
        if found is None:
            raise InputError(
                f"--device: nothing is known of {present.device_kind!r}; name one of "
                f"{', '.join(DEVICES)}"
            )
        limit = (present.memory_stats() or {}).get("bytes_limit")
        return DEVICES[found]._replace(
            name=present.device_kind, memory=limit or DEVICES[found].memory
        )
    if name == "cpu":
        return measure_cpu()
    if name not in DEVICES:
        raise InputError(f"--device: {name!r} is none of cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def host_memory() -> int:
    """Memory of this machine that is free for the run, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_cpu(side: int = 1024) -> Device:
    """This machine's processor: what a matrix product and a sum reach, in a second or so.

    Args:
        side: Of the square matrices.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        matrix = jnp.ones((side, side), jnp.float32)
        product = jax.jit(lambda a: a @ a)
        flops = 2 * side**3 / _best_seconds(lambda: product(matrix))
        long = jnp.ones(16 * 2**20, jnp.float32)
        add = jax.jit(lambda a: a + 1)
        bandwidth = 2 * long.nbytes / _best_seconds(lambda: add(long))
    # Half precision is widened before it is multiplied.
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), flops)
    name = f"this machine's CPU ({os.cpu_count()} cores)"
    return Device(name, rates, bandwidth, host_memory(), 1.0)


def _best_seconds(run: object) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return float(np.min(seconds))
