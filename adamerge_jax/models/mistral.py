"""Mistral (Jiang et al., 2023): a Llama whose layers see a window of the text, up to version 0.1.

Later versions have no window. There are no biases.
"""

from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, decoder_family
from adamerge_jax.models.layers import Config


class MistralLayer(PreNormLayer):
    def __init__(self, config: Config):
        super().__init__(config, Attention(config))


FAMILY = decoder_family(
    MistralLayer, windows=lambda config: [config.sliding_window] * config.num_hidden_layers
)
