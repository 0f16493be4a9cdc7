"""One merge that several tests look at."""

from typing import Any

import pytest

import adamerge_jax as am
from tests.own_model.linear import BASE, DATA, EXPERTS, forward


@pytest.fixture(scope="package")
def merged() -> am.Merged[dict[str, Any]]:
    return am.merge(BASE, EXPERTS, forward, DATA, steps=20, progress=False)
