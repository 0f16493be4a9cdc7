"""Models are taken apart into arrays with names; what cannot be is refused with the leaf's name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from adamerge_jax import InputError
from adamerge_jax.own_model.leaves import require_alike, require_finite, take_apart

KERNEL = jnp.ones((2, 3))


def test_leaves_are_sorted_into_three_kinds():
    model = {"kernel": KERNEL, "act": jax.nn.relu, "count": np.arange(2), "rate": 0.5}
    model["key"] = jax.random.key(0)
    leaves = take_apart(model, "base")
    assert list(leaves.parameters) == ["kernel"]
    assert sorted(leaves.others) == ["count", "key"]
    assert sorted(leaves.static) == ["act", "rate"]
    again = leaves.rebuild(leaves.arrays | {"kernel": 2 * KERNEL})
    assert again["act"] is jax.nn.relu and (again["kernel"] == 2).all()


def test_a_shared_module_of_nnx_is_one():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.second = self.first

    leaves = take_apart(Tied(), "base")
    assert list(leaves.parameters) == ["first.bias", "first.kernel"]
    again = leaves.rebuild(leaves.arrays)
    assert again.second is again.first


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kernel": torch.ones(2)}, "leaf 'kernel' is a torch.Tensor, expected an array"),
        ({"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}, "or restore it from its checkpoint"),
        ({"a.b": KERNEL, "a": {"b": KERNEL}}, "two leaves are called 'a.b'"),
        ({"count": np.arange(3)}, "no leaf of this dict is a floating-point array"),
        (KERNEL, "is a single array"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(InputError, match=r"^base: ") as caught:
        take_apart(model, "base")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"x": KERNEL}, "leaf 'bias' is an array in base and not in expert (and 2 more)"),
        ({"bias": 0.5, "kernel": KERNEL}, "leaf 'bias' is an array in base and no array in expert"),
        ({"bias": KERNEL[0], "kernel": KERNEL, "x": KERNEL}, "leaf 'x' is an array in expert"),
        ({"bias": KERNEL[0], "kernel": KERNEL.T}, "leaf 'kernel' has shape (3, 2), the base has"),
        ({"bias": KERNEL[0], "kernel": KERNEL.astype(int)}, "leaf 'kernel' is int32, the base has"),
        ({"bias": KERNEL[0], "kernel": KERNEL, "rate": 0.1}, "leaf 'rate' is 0.1, the base has 0."),
    ],
)
def test_an_expert_that_differs_is_refused(expert, message):
    base = take_apart({"bias": KERNEL[0], "kernel": KERNEL, "rate": 0.0}, "base")
    with pytest.raises(InputError) as caught:
        require_alike(base, take_apart(expert, "expert"))
    assert message in str(caught.value)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(InputError, match="leaf 'kernel' has a number that is NaN"):
        require_finite(take_apart({"kernel": KERNEL.at[1, 1].set(jnp.nan)}, "expert 'law'"))
