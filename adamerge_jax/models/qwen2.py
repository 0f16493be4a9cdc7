"""Qwen 2 and 2.5 (Qwen Team, 2024): a Llama with biases on queries, keys and values.

Its upper layers may see only a window of the text; the published models do not use it.
"""

from adamerge_jax.models.decoder_layers import (
    Attention,
    PreNormLayer,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.layers import Config


class Qwen2Layer(PreNormLayer):
    def __init__(self, config: Config):
        super().__init__(config, Attention(config, bias=True))


FAMILY = decoder_family(Qwen2Layer, windows=windows_by_type)
