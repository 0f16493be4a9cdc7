"""Granite 3 (IBM, 2024): a Llama with factors of embeddings, attention, residuals and logits."""

from adamerge_jax.models.decoder_layers import (
    Attention,
    PreNormLayer,
    decoder_family,
    scaled_head,
)
from adamerge_jax.models.layers import Config


class GraniteLayer(PreNormLayer):
    def __init__(self, config: Config):
        bias = config.attention_bias
        attention = Attention(
            config, bias=bias, output_bias=bias, scale=config.attention_multiplier
        )
        super().__init__(
            config, attention, mlp_bias=config.mlp_bias, residual=config.residual_multiplier
        )


FAMILY = decoder_family(
    GraniteLayer,
    embedding_scale=lambda config: config.embedding_multiplier,
    head=scaled_head(lambda config: 1 / config.logits_scaling),
)
