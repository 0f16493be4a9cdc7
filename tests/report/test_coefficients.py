from dataclasses import replace

import numpy as np
import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.report.coefficients import range_warning
from tests.report.saved_runs import COEFFICIENTS


def changed(value: float, **fields):
    """The coefficients with another one of `dog`."""
    values = {name: array.copy() for name, array in COEFFICIENTS.values.items()}
    values["vit.layernorm.weight"][1] = value
    return replace(COEFFICIENTS, values=values, **fields)


@pytest.mark.parametrize(
    ("value", "initial", "is_within"),
    [
        (3.0, None, True),
        (3.01, None, False),
        (-2.0, 0.3, True),
        (-2.01, 0.3, False),
        (4.9, 3.0, True),  # whoever starts at 3 may end near it
        (5.1, 3.0, False),
        (-4.9, -3.0, True),
        (8e9, 0.3, False),
        (3e38, 0.3, False),
    ],
)
def test_the_sensible_range(value, initial, is_within):
    assert (range_warning(changed(value, initial=initial)) is None) == is_within


def test_the_warning():
    warning = range_warning(changed(8e9, initial=0.3))
    assert warning.startswith(
        "1 of 8 coefficients are outside of -2 to 3, the farthest of dog at 8e+09 (constraint "
        "free, start 0.3); a low objective does not make such a merge good"
    )
    # The farthest is not always the largest.
    assert "of dog at -50 (" in range_warning(changed(-50.0).times({"cat": 10.0}))
    assert "of cat at 400 (" in range_warning(changed(-50.0).times({"cat": 1000.0}))


def test_inspect_warns(tmp_path, capsys):
    file = tmp_path / "coefficients.safetensors"
    COEFFICIENTS.save(file)
    cli.main(["inspect", str(file)])
    assert "warning" not in capsys.readouterr().out
    changed(8e9, initial=0.3, objective="\x1b[2J\nobjective").save(file)
    cli.main(["inspect", str(file)])
    printed = capsys.readouterr().out
    assert "warning: 1 of 8 coefficients are outside of -2 to 3" in printed
    assert "objective      [2J objective\n" in printed


def test_large_coefficients_have_finite_means():
    values = {name: np.full_like(array, 3e38) for name, array in COEFFICIENTS.values.items()}
    with np.errstate(all="raise"):
        warning = range_warning(replace(COEFFICIENTS, values=values))
    assert "at 3e+38" in warning
