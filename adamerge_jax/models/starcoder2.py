"""StarCoder 2 (Lozhkov et al., 2024): centred norms, biases, and an MLP without a gate."""

from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, decoder_family
from adamerge_jax.models.layers import Config, LayerNorm, Linear, activation_of


class Starcoder2MLP(nnx.Module):
    def __init__(self, config: Config):
        width, intermediate = config.hidden_size, config.intermediate_size
        self.c_fc = Linear(width, intermediate, bias=config.use_bias)
        self.c_proj = Linear(intermediate, width, bias=config.use_bias)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.c_proj(self.activation(self.c_fc(x)))


class Starcoder2Layer(PreNormLayer):
    def __init__(self, config: Config):
        attention = Attention(config, bias=config.use_bias, output_bias=config.use_bias)
        super().__init__(config, attention, mlp=Starcoder2MLP(config), norm=LayerNorm)


FAMILY = decoder_family(
    Starcoder2Layer,
    norm=LayerNorm,
    windows=lambda config: [config.sliding_window] * config.num_hidden_layers,
)
