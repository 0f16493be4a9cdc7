"""What the command asks of glibc's allocator."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS_OF_ARRAYS_IN_A_THREAD = """
import resource, threading
from adamerge_jax.cli.allocation import keep_freed_memory
keep_freed_memory()
def fill():
    for _ in range(6):
        b"1" * (80 * 2**20)
thread = threading.Thread(target=fill)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start(), thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_arrays_are_kept_unless_the_user_says_otherwise():
    pages = 80 * 2**20 // os.sysconf("SC_PAGE_SIZE")

    def faults(**variables: str) -> int:
        free = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        process = subprocess.run(
            [sys.executable, "-c", FAULTS_OF_ARRAYS_IN_A_THREAD],
            env=free | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(process.stdout)

    assert faults() < 2 * pages
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 5 * pages
