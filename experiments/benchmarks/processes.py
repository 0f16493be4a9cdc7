"""Measurements in processes of their own, so that a peak of memory is that of one alone."""

import json
import os
import subprocess
import sys
from typing import Any


def in_own_process(file: str, *arguments: object, devices: int | None = None) -> Any:
    """Runs a benchmark anew and returns the JSON in the last line that it prints.

    Args:
        file: The benchmark.
        arguments: Its arguments.
        devices: The number of virtual CPU devices; None for those that there are.

    Raises:
        SystemExit: It fails; with all that it printed.
    """
    environment = dict(os.environ)
    if devices is not None:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    command = [sys.executable, file, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
