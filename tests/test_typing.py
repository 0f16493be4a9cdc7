"""A strict type checker accepts a user's script, and refuses one that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

SCRIPT = Path(__file__).with_name("users_script.py")

# Following the imports of JAX and NumPy would take half a minute.
CONFIG = """
[mypy]
strict = true
follow_imports = skip
[mypy-adamerge_jax,adamerge_jax.*]
follow_imports = silent
"""

WRONG = {
    "am.nothing": 'Module has no attribute "nothing"',
    "am.merge(base, experts, forward, data, step=3)": 'Unexpected keyword argument "step"',
    "am.merge(base, experts, forward)": 'Missing positional argument "data"',
    "merged.parameters.nothing": 'has no attribute "nothing"',
    "prepared.nothing": '"Prepared" has no attribute "nothing"',
    "am.run_recipe(recipe)": 'Missing positional argument "out"',
    "learned.nothing": '"Learned" has no attribute "nothing"',
}


def test_a_users_script_passes_and_a_wrong_one_does_not(tmp_path: Path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    script = SCRIPT.read_text()
    (tmp_path / "right.py").write_text(script)
    (tmp_path / "wrong.py").write_text(script + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "right.py", "wrong.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": "", "MYPYPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("right.py")], done.stdout
    first = len(script.splitlines()) + 1
    for number, message in enumerate(WRONG.values(), first):
        assert message in "".join(line for line in lines if line.startswith(f"wrong.py:{number}:"))
