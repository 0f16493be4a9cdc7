"""GPT-NeoX and Pythia (Black et al., 2022): attention and MLP side by side, heads turn in part.

Queries, keys and values of a head lie together in one projection.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.models.decoder_layers import Attention, Names, PreNormLayer, decoder_family
from adamerge_jax.models.family import HeadAxes
from adamerge_jax.models.layers import Config, LayerNorm, Linear, activation_of
from adamerge_jax.models.rotary import Rotary


class GPTNeoXAttention(Attention):
    def make_projections(self, width: int, bias: bool, output_bias: bool) -> None:
        self.query_key_value = Linear(width, 3 * self.heads * self.features, bias=bias)
        self.dense = Linear(self.heads * self.features, width, bias=output_bias)

    def project(
        self, x: Float[Array, "B T H"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"], Float[Array, "B T H"]]:
        by_head = self.query_key_value(x).reshape(*x.shape[:2], self.heads, 3, self.features)
        query, key, values = jnp.moveaxis(by_head, 3, 0).reshape(3, *x.shape[:2], -1)
        return query, key, values

    def project_back(self, mixed: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.dense(mixed)


class GPTNeoXMLP(nnx.Module):
    def __init__(self, config: Config):
        width, intermediate = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = Linear(width, intermediate)
        self.dense_4h_to_h = Linear(intermediate, width)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class GPTNeoXLayer(PreNormLayer):
    attention_name = "attention"

    def __init__(self, config: Config):
        bias = config.attention_bias
        super().__init__(
            config,
            GPTNeoXAttention(config, bias=bias, output_bias=bias),
            mlp=GPTNeoXMLP(config),
            norm=LayerNorm,
            parallel="separate" if config.use_parallel_residual else None,
        )


def _heads(config: Config) -> HeadAxes:
    heads = config.num_attention_heads
    return {
        "*.attention.query_key_value.*": (0, heads),
        "*.attention.dense.weight": (1, heads),
    }


FAMILY = decoder_family(
    GPTNeoXLayer,
    norm=LayerNorm,
    rotaries=lambda config: [Rotary.of(config, partial=True)] * config.num_hidden_layers,
    heads=_heads,
    names=Names("gpt_neox", "embed_in", "final_layer_norm", "embed_out"),
    # Masks, which old files have.
    ignored=("*.attention.bias", "*.attention.masked_bias"),
)
