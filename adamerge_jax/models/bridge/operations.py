"""Operations of PyTorch whose versions in torchax are replaced, for the speed of learning."""

from typing import Any

import torch
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from adamerge_jax.models.layers import LINEAR_OUTPUT


def linear(
    x: Float[Array, "... in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "... out"]:
    """Returns `x @ weight.T + bias`, under the name by which its result is kept.

    The product is over flat rows, whose gradient XLA's CPU backend computes faster.
    """
    y = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y = y + bias
    return checkpoint_name(y, LINEAR_OUTPUT).reshape(*x.shape[:-1], -1)


def replace_operations(environment: Any) -> None:
    """Replaces operations in an environment of torchax."""
    from torchax.ops.ops_registry import Operator

    for operation in (torch.nn.functional.linear, torch.ops.aten.linear):
        environment._ops[operation] = Operator(
            operation,
            linear,
            is_jax_function=True,
            is_user_defined=True,
            needs_env=False,
            is_view_op=False,
        )
