"""Mistral (Jiang et al., 2023): a Llama whose layers see a window of the text, up to version 0.1.

Later versions have no window. There are no biases.
"""

from transformers import MistralConfig

from adamerge_jax.models.decoder_layers import Attention, DecoderBackbone, PreNormLayer
from adamerge_jax.models.layers import Rematerialize


class MistralLayer(PreNormLayer):
    def __init__(self, config: MistralConfig):
        super().__init__(config, Attention(config))


class MistralBackbone(DecoderBackbone):
    """What is merged in a `MistralForCausalLM`."""

    def __init__(self, config: MistralConfig, rematerialize: Rematerialize):
        windows = [config.sliding_window] * config.num_hidden_layers
        super().__init__(config, rematerialize, MistralLayer, windows=windows)
