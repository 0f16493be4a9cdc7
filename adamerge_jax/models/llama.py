"""Llama (Touvron et al., 2023; Grattafiori et al., 2024): versions 2, 3 and 3.1 to 3.3.

Nothing but the layers that all decoders share. Version 3.1 stretches the longer wavelengths of its
rotary positions (`rope_type` `llama3`).
"""

from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, decoder_family
from adamerge_jax.models.layers import Config


class LlamaLayer(PreNormLayer):
    def __init__(self, config: Config):
        bias = config.attention_bias
        attention = Attention(config, bias=bias, output_bias=bias)
        super().__init__(config, attention, mlp_bias=config.mlp_bias)


FAMILY = decoder_family(LlamaLayer)
