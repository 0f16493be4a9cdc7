"""The corpus: all kinds of bad inputs, and the check that each is refused."""

import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np

from tests.bad_inputs.refusal import Accepted, faults_of, outcome
from tests.bad_inputs.suites import copy_suite

SEED = 0

DRAWN = 25
"""The number of each kind that every run of the tests tries; `BAD_INPUTS=all` tries all."""


def require_refused(kind: str, suites: dict[str, Path], folder: Path) -> None:
    """Refuses each input of a kind, or fails with all that are not.

    Args:
        kind: Name of the kind: a module of this folder.
        suites: The folders of the suites by name.
        folder: A new folder.
    """
    inputs = list(
        import_module(f"tests.bad_inputs.{kind}").make(np.random.default_rng(SEED), suites)
    )
    assert len({bad.name for bad in inputs}) == len(inputs)
    assert len(inputs) >= DRAWN
    if os.environ.get("BAD_INPUTS") != "all":
        chosen = np.random.default_rng(SEED).permutation(len(inputs))[:DRAWN]
        inputs = [inputs[number] for number in sorted(chosen)]
    faults = []
    for number, bad in enumerate(inputs):
        place = folder / str(number)
        place.mkdir()
        for fault in faults_of(bad, suites[bad.suite], place):
            faults.append(f"{bad.name} ({bad.command}): {fault}")
        shutil.rmtree(place)
    assert not faults, "\n".join([f"{len(faults)} faults of {len(inputs)} inputs", *faults])


def require_accepted(kind: str, suites: dict[str, Path], folder: Path) -> None:
    """Accepts what the bad inputs of a kind are made of: so it is the damage that is refused."""
    module = import_module(f"tests.bad_inputs.{kind}")
    for number, good in enumerate(module.healthy(np.random.default_rng(SEED), suites)):
        place = folder / str(number)
        place.mkdir()
        root = copy_suite(suites[good.suite], place / "case")
        good.damage(root)
        status, errors = outcome(good.command, root, place)
        expected = Accepted.__name__ if good.command.startswith("learn") else 0
        assert (status, errors) == (expected, ""), f"{good.name}: ends with {status}: {errors}"
