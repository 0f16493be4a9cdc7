"""Mistral (Jiang et al., 2023): a Llama whose layers see a window of the text, up to version 0.1.

Later versions have no window. There are no biases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adamerge_jax.models.decoder_layers import (
    Attention,
    DecoderBackbone,
    PreNormLayer,
    decoder_family,
)
from adamerge_jax.models.layers import Rematerialize

if TYPE_CHECKING:
    from transformers import MistralConfig


class MistralLayer(PreNormLayer):
    def __init__(self, config: MistralConfig):
        super().__init__(config, Attention(config))


class MistralBackbone(DecoderBackbone):
    """The merged part of a `MistralForCausalLM`."""

    def __init__(self, config: MistralConfig, rematerialize: Rematerialize):
        windows = [config.sliding_window] * config.num_hidden_layers
        super().__init__(config, rematerialize, MistralLayer, windows=windows)


FAMILY = decoder_family(MistralBackbone)
