"""Qwen 3 (Qwen Team, 2025): a Llama that normalises the queries and keys of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adamerge_jax.models.decoder_layers import (
    Attention,
    DecoderBackbone,
    PreNormLayer,
    RMSNorm,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.layers import Rematerialize

if TYPE_CHECKING:
    from transformers import Qwen3Config


class Qwen3Layer(PreNormLayer):
    def __init__(self, config: Qwen3Config):
        bias = config.attention_bias
        super().__init__(config, Attention(config, bias=bias, output_bias=bias, norm=RMSNorm))


class Qwen3Backbone(DecoderBackbone):
    """The merged part of a `Qwen3ForCausalLM`."""

    def __init__(self, config: Qwen3Config, rematerialize: Rematerialize):
        super().__init__(config, rematerialize, Qwen3Layer, windows=windows_by_type(config))


FAMILY = decoder_family(Qwen3Backbone)
