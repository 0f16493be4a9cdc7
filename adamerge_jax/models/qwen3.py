"""Qwen 3 (Qwen Team, 2025): a Llama that normalises the queries and keys of each head."""

from adamerge_jax.models.decoder_layers import (
    Attention,
    PreNormLayer,
    RMSNorm,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.layers import Config


class Qwen3Layer(PreNormLayer):
    def __init__(self, config: Config):
        bias = config.attention_bias
        super().__init__(config, Attention(config, bias=bias, output_bias=bias, norm=RMSNorm))


FAMILY = decoder_family(Qwen3Layer, windows=windows_by_type)
