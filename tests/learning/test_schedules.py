import jax
import numpy as np
import pytest
import torch

from adamerge_jax.learning.schedules import cosine_warm_restarts


@pytest.mark.parametrize("first_steps", [7, 10, 50])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("end_ratio", [0.0, 0.1])
def test_cosine_warm_restarts_as_in_pytorch(first_steps, factor, end_ratio):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, first_steps, factor, eta_min=end_ratio * 0.5
    )
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = jax.jit(cosine_warm_restarts(0.5, 200, first_steps, factor, end_ratio))
    found = [float(schedule(step)) for step in range(200)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * 0.5)
    # Restarts are at these very steps.
    np.testing.assert_array_equal(np.isclose(found, 0.5), np.isclose(expected, 0.5))


@pytest.mark.parametrize("options", [{"first_steps": 0}, {"factor": 0}])
def test_impossible_periods_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        cosine_warm_restarts(0.5, 200, **options)
