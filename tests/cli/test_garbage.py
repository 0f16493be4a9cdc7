"""Searches for cyclic garbage are put off while a plan is made, and go on after it."""

import gc

import pytest

from adamerge_jax.cli.garbage import uncollected


def test_searches_go_on_as_before():
    with pytest.raises(ValueError, match="stopped"), uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
        raise ValueError("stopped")
    assert gc.isenabled()
