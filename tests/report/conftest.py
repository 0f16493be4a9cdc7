"""Tests of the report look at its pictures."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest


@pytest.fixture(scope="package", autouse=True)
def drawn(drawn_figures: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Draws the figures of these tests."""
    with drawn_figures():
        yield
