"""Llama (Touvron et al., 2023; Grattafiori et al., 2024): versions 2, 3 and 3.1 to 3.3.

The family that the others are told by: nothing but what decoders share. Version 3.1 stretches the
longer wavelengths of its rotary positions (`rope_type` `llama3`).
"""

from transformers import LlamaConfig

from adamerge_jax.models.decoder_layers import Attention, DecoderBackbone, PreNormLayer
from adamerge_jax.models.layers import Rematerialize


class LlamaLayer(PreNormLayer):
    def __init__(self, config: LlamaConfig):
        bias = config.attention_bias
        attention = Attention(config, bias=bias, output_bias=bias)
        super().__init__(config, attention, mlp_bias=config.mlp_bias)


class LlamaBackbone(DecoderBackbone):
    """What is merged in a `LlamaForCausalLM`."""

    def __init__(self, config: LlamaConfig, rematerialize: Rematerialize):
        super().__init__(config, rematerialize, LlamaLayer)
