"""The speed and memory of devices: published figures, and a quick measurement of a CPU.

Figures are of one device, dense (no structured sparsity):

- `h100` and `a100` (SXM, 80 GB), `h200`, `l4`: NVIDIA's datasheets of these Tensor Core GPUs.
- Their links to the host: PCI Express, generation 5 for `h100` and `h200`, 4 for the others. Of
  TPUs none is published, and 16 GB/s are assumed.
- `tpu-v4`, `tpu-v5e`, `tpu-v5p`, `tpu-v6e`: Google Cloud TPU documentation, one page a version.

float32 is the default precision of JAX for float32 matrix products there: TF32 on NVIDIA's, one
pass of bfloat16 on TPUs.
"""

import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from adamerge_jax.errors import InputError


class Device(NamedTuple):
    """The speed and memory of a device.

    Attributes:
        name: The name in the table.
        flops: The floating-point operations per second of matrix products, by dtype.
        bandwidth: The bandwidth of its memory, in bytes per second.
        memory: The memory that a run may use, in bytes.
        attainable: The part of these rates that a step is assumed to reach: 1 for measured rates.
        kinds: Parts of JAX's name for the device, in lower case.
        is_cpu: True if its memory is the host's.
        link: The bandwidth from the host's memory to the device, in bytes per second.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: int
    attainable: float
    kinds: tuple[str, ...] = ()
    is_cpu: bool = False
    link: float = 16e9


ATTAINABLE = 0.4
"""The part of a published rate that a step is assumed to reach, without a measurement."""

PCIE_4, PCIE_5 = 32e9, 64e9
"""The bandwidth of 16 lanes in one direction, in bytes per second."""

DISK = 2e9
"""The bytes per second that are read from a disk, assumed."""

GPU_SHARE = 0.75
"""The part of a GPU's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


def _gpu(
    name: str, half: float, single: float, bandwidth: float, gigabytes: float, link: float
) -> Device:
    """Makes a GPU from its TFLOP/s in 16 bits and in float32, GB/s, GB, and its link in B/s."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    memory = int(GPU_SHARE * gigabytes * 1e9)
    kinds = (name.split()[0].lower(),)
    return Device(f"NVIDIA {name}", flops, bandwidth * 1e9, memory, ATTAINABLE, kinds, link=link)


def _tpu(name: str, rate: float, bandwidth: float, gibibytes: int, *kinds: str) -> Device:
    """Makes a TPU from its TFLOP/s in bfloat16, GB/s and GiB."""
    flops = dict.fromkeys(("bfloat16", "float16", "float32"), rate * 1e12)
    return Device(f"TPU {name}", flops, bandwidth * 1e9, gibibytes * 2**30, ATTAINABLE, kinds)


DEVICES = {
    "h100": _gpu("H100 SXM", 989, 494, 3350, 80, PCIE_5),
    "h200": _gpu("H200 SXM", 989, 494, 4800, 141, PCIE_5),
    "a100": _gpu("A100 SXM 80 GB", 312, 156, 2039, 80, PCIE_4),
    "l4": _gpu("L4", 121, 60, 300, 24, PCIE_4),
    "tpu-v4": _tpu("v4", 275, 1228, 32, "tpu v4"),
    "tpu-v5e": _tpu("v5e", 197, 819, 16, "tpu v5 lite", "tpu v5e"),
    "tpu-v5p": _tpu("v5p", 459, 2765, 95, "tpu v5p", "tpu v5"),
    "tpu-v6e": _tpu("v6e", 918, 1640, 32, "tpu v6 lite", "tpu v6e"),
}
"""Devices by their names on the command line."""


def find_device(name: str | None) -> Device:
    """Returns a device of the table, this machine's processor (`cpu`), or the present device.

    Args:
        name: A key of `DEVICES`, `cpu`, or None for the present device.

    Raises:
        InputError: There is no such device, or the present one is not in the table.
    """
    present = jax.devices()[0]
    if name == "cpu" or (name is None and present.platform == "cpu"):
        return measure_cpu()
    if name is not None:
        if name not in DEVICES:
            raise InputError(f"--device: {name!r} is none of cpu, {', '.join(DEVICES)}")
        return DEVICES[name]
    device_kind = present.device_kind.lower()
    for device in DEVICES.values():
        if any(re.search(rf"\b{kind}\b", device_kind) for kind in device.kinds):
            limit = (present.memory_stats() or {}).get("bytes_limit", device.memory)
            return device._replace(name=present.device_kind, memory=limit)
    raise InputError(
        f"--device: nothing is known of {present.device_kind!r}; name the one that is most like it "
        f"of {', '.join(DEVICES)}"
    )


def host_memory() -> int:
    """Returns the memory of this machine that is free for a run, in bytes."""
    return psutil.virtual_memory().available


def resident_bytes() -> int:
    """Returns the memory that this process occupies now, in bytes."""
    return psutil.Process().memory_info().rss


def measure_cpu(side: int = 1024) -> Device:
    """Measures a matrix product and a sum on this machine's processor, in about a second.

    Args:
        side: The number of rows and columns of the matrices.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        matrix = jnp.ones((side, side), jnp.float32)
        product = jax.jit(lambda a: a @ a)
        flops = 2 * side**3 / _best_seconds(lambda: product(matrix))
        vector = jnp.ones(16 * 2**20, jnp.float32)
        add = jax.jit(lambda a: a + 1)
        bandwidth = 2 * vector.nbytes / _best_seconds(lambda: add(vector))
    # Half precision is widened before it is multiplied.
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), flops)
    name = f"this machine's CPU ({usable_cores()} cores)"
    return Device(name, rates, bandwidth, host_memory(), 1.0, is_cpu=True, link=bandwidth)


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _best_seconds(run: Callable[[], object]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return float(np.min(seconds))
