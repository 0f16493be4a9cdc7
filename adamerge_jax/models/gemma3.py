"""Gemma 3 (Gemma Team, 2025), text only: a Gemma 2 that normalises the queries and keys of heads.

Layers that see a window of the text rotate positions faster than those that see all of it. There
is no soft cap on attention.
"""

from adamerge_jax.models.decoder_layers import Attention, decoder_family, windows_by_type
from adamerge_jax.models.gemma2 import GemmaHead, GemmaLayer, GemmaNorm
from adamerge_jax.models.layers import Config
from adamerge_jax.models.rotary import Rotary


class Gemma3Layer(GemmaLayer):
    def __init__(self, config: Config):
        attention = Attention(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            norm=GemmaNorm,
            scale=config.query_pre_attn_scalar**-0.5,
        )
        super().__init__(config, attention)


FAMILY = decoder_family(
    Gemma3Layer,
    windows=windows_by_type,
    rotaries=lambda config: [Rotary.of(config, kind) for kind in config.layer_types],
    norm=GemmaNorm,
    embedding_scale=lambda config: config.hidden_size**0.5,
    head=GemmaHead,
)
