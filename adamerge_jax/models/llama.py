"""Llama (Touvron et al., 2023; Grattafiori et al., 2024): versions 2, 3 and 3.1 to 3.3.

Nothing but the layers that all decoders share. Version 3.1 stretches the longer wavelengths of its
rotary positions (`rope_type` `llama3`).
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
    from transformers import LlamaConfig


class LlamaLayer(PreNormLayer):
    def __init__(self, config: LlamaConfig):
        bias = config.attention_bias
        attention = Attention(config, bias=bias, output_bias=bias)
        super().__init__(config, attention, mlp_bias=config.mlp_bias)


class LlamaBackbone(DecoderBackbone):
    """The merged part of a `LlamaForCausalLM`."""

    def __init__(self, config: LlamaConfig, rematerialize: Rematerialize):
        super().__init__(config, rematerialize, LlamaLayer)


FAMILY = decoder_family(LlamaBackbone)
