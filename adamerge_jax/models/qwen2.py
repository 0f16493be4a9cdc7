"""Qwen 2 and 2.5 (Qwen Team, 2024): a Llama with biases on queries, keys and values.

Its upper layers may see only a window of the text; the published models do not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adamerge_jax.models.decoder_layers import (
    Attention,
    DecoderBackbone,
    PreNormLayer,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.layers import Rematerialize

if TYPE_CHECKING:
    from transformers import Qwen2Config


class Qwen2Layer(PreNormLayer):
    def __init__(self, config: Qwen2Config):
        super().__init__(config, Attention(config, bias=True))


class Qwen2Backbone(DecoderBackbone):
    """The merged part of a `Qwen2ForCausalLM`."""

    def __init__(self, config: Qwen2Config, rematerialize: Rematerialize):
        super().__init__(config, rematerialize, Qwen2Layer, windows=windows_by_type(config))


FAMILY = decoder_family(Qwen2Backbone)
