"""Command R (Cohere, 2024): attention and MLP read one norm; neighbouring features turn.

Norms centre and have no bias, logits have a factor.
"""

from adamerge_jax.models.decoder_layers import (
    Attention,
    CentredNorm,
    PreNormLayer,
    decoder_family,
    scaled_head,
)
from adamerge_jax.models.layers import Config


class CohereLayer(PreNormLayer):
    def __init__(self, config: Config):
        bias = config.attention_bias
        has_norms = getattr(config, "use_qk_norm", False)
        attention = Attention(
            config,
            bias=bias,
            output_bias=bias,
            norm=CentredNorm if has_norms else None,
            norm_of="each_head",
            interleaved=True,
        )
        super().__init__(config, attention, norm=CentredNorm, parallel="shared")


CohereHead = scaled_head(lambda config: config.logit_scale)

FAMILY = decoder_family(CohereLayer, norm=CentredNorm, head=CohereHead)
