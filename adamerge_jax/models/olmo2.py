"""OLMo 2 (OLMo Team, 2024): norms behind attention and MLP, and on all heads' queries and keys."""

from adamerge_jax.models.decoder_layers import Attention, PostNormLayer, RMSNorm, decoder_family
from adamerge_jax.models.layers import Config


class Olmo2Layer(PostNormLayer):
    def __init__(self, config: Config):
        bias = config.attention_bias
        attention = Attention(
            config, bias=bias, output_bias=bias, norm=RMSNorm, norm_of="projection"
        )
        super().__init__(config, attention)


FAMILY = decoder_family(Olmo2Layer)
