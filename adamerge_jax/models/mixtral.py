"""Mixtral (Jiang et al., 2024): a Mistral with a mixture of experts in every layer."""

from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, decoder_family
from adamerge_jax.models.experts import MixtureOfExperts
from adamerge_jax.models.layers import Config


class MixtralLayer(PreNormLayer):
    mlp_name = "block_sparse_moe"

    def __init__(self, config: Config):
        experts = MixtureOfExperts(
            config,
            config.num_local_experts,
            config.intermediate_size,
            normalised=True,
            names=("w1", "w3", "w2"),
        )
        super().__init__(config, Attention(config), mlp=experts)


FAMILY = decoder_family(
    MixtralLayer, windows=lambda config: [config.sliding_window] * config.num_hidden_layers
)
