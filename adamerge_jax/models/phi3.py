"""Phi 3, 3.5 and 4 (Abdin et al., 2024), text only: a Llama with fused projections.

Queries, keys and values are one tensor, gate and `up` of the MLP another, as in the checkpoint.
Heads may turn in part, and long texts may turn by other speeds than short ones (`longrope`).
"""

from adamerge_jax.models.decoder_layers import (
    FusedAttention,
    FusedGatedMLP,
    PreNormLayer,
    decoder_family,
    fused_heads,
)
from adamerge_jax.models.layers import Config
from adamerge_jax.models.rotary import Rotary


class Phi3Layer(PreNormLayer):
    def __init__(self, config: Config):
        super().__init__(config, FusedAttention(config), mlp=FusedGatedMLP(config))


FAMILY = decoder_family(
    Phi3Layer,
    windows=lambda config: [config.sliding_window] * config.num_hidden_layers,
    rotaries=lambda config: [Rotary.of(config, partial=True)] * config.num_hidden_layers,
    heads=fused_heads,
)
