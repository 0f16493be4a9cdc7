"""Mixtures of experts: a router sends each token through some of a layer's MLPs.

Experts are apart, as in a checkpoint (`mlp.experts.3.up_proj.weight`), so that each has task
vectors and coefficients of its own.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.models.layers import Activation, Config, Linear, activation_of, value


class Expert(nnx.Module):
    """The weights of one gated MLP, by the names that the architecture has for them.

    Args:
        width: The hidden size.
        intermediate: The features between.
        names: The names of gate, `up` and `down`.
    """

    def __init__(self, width: int, intermediate: int, names: tuple[str, str, str]):
        gate, up, down = names
        setattr(self, gate, Linear(width, intermediate, bias=False))
        setattr(self, up, Linear(width, intermediate, bias=False))
        setattr(self, down, Linear(intermediate, width, bias=False))


class Experts(nnx.Module):
    """The experts of a layer, `experts.0`, `experts.1` and so on."""

    def __init__(
        self,
        count: int,
        width: int,
        intermediate: int,
        names: tuple[str, str, str],
        activation: str,
    ):
        for number in range(count):
            setattr(self, str(number), Expert(width, intermediate, names))
        self.count, self.names = count, names
        self.activation: Activation = activation_of(activation)

    def __call__(
        self,
        x: Float[Array, "tokens H"],
        chosen: Int[Array, "tokens chosen"],
        weights: Float[Array, "tokens chosen"],
    ) -> Float[Array, "tokens H"]:
        """Returns the sum of the chosen experts' outputs, each times its weight.

        Tokens are sorted by expert, and each expert's go through it in one product of groups.
        """
        gate, up, down = map(self._stacked, self.names)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count).astype(jnp.int32)
        token = order // chosen.shape[1]
        read = x[token]
        activated = self.activation(jax.lax.ragged_dot(read, gate, sizes))
        activated = activated * jax.lax.ragged_dot(read, up, sizes)
        written = jax.lax.ragged_dot(activated, down, sizes)
        written = written * weights.reshape(-1)[order][:, None].astype(written.dtype)
        return jnp.zeros_like(x).at[token].add(written.astype(x.dtype))

    def _stacked(self, name: str) -> Float[Array, "experts inputs outputs"]:
        """Returns the weights of all experts, transposed as a product of groups needs them."""
        weights = [
            value(getattr(getattr(self, str(number)), name).weight) for number in range(self.count)
        ]
        return jnp.stack(weights).swapaxes(1, 2)


class MixtureOfExperts(nnx.Module):
    """A router, its experts, and perhaps an expert that all tokens go through.

    Args:
        config: The model's config; `num_experts_per_tok` experts are chosen for a token.
        count: The number of experts.
        intermediate: The features between of each expert.
        normalised: The weights of a token's experts add up to 1.
        names: The names of an expert's gate, `up` and `down`.
        shared: The expert of all tokens, or None.
    """

    def __init__(
        self,
        config: Config,
        count: int,
        intermediate: int,
        *,
        normalised: bool,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        shared: nnx.Module | None = None,
    ):
        width = config.hidden_size
        self.gate = Linear(width, count, bias=False)
        self.experts = Experts(count, width, intermediate, names, config.hidden_act)
        self.chosen, self.normalised = config.num_experts_per_tok, normalised
        if shared is not None:
            self.shared_expert = shared
            self.shared_expert_gate = Linear(width, 1, bias=False)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        flat = x.reshape(-1, x.shape[-1])
        probabilities = jax.nn.softmax(self.gate(flat).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.chosen)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        mixed = self.experts(flat, chosen, weights)
        if hasattr(self, "shared_expert"):
            share = jax.nn.sigmoid(self.shared_expert_gate(flat))
            mixed = mixed + share * self.shared_expert(flat)
        return mixed.reshape(x.shape)
