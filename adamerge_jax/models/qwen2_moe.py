"""Qwen 1.5 and 2 with a mixture of experts and one that all tokens share (Qwen Team, 2024)."""

from adamerge_jax.models.decoder_layers import (
    Attention,
    GatedMLP,
    PreNormLayer,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.experts import MixtureOfExperts
from adamerge_jax.models.layers import Config
from adamerge_jax.models.qwen3_moe import require_experts_everywhere


class Qwen2MoeLayer(PreNormLayer):
    def __init__(self, config: Config):
        require_experts_everywhere(config)
        intermediate = config.shared_expert_intermediate_size
        experts = MixtureOfExperts(
            config,
            config.num_experts,
            config.moe_intermediate_size,
            normalised=config.norm_topk_prob,
            shared=GatedMLP(config, config.hidden_act, intermediate=intermediate),
        )
        super().__init__(config, Attention(config, bias=config.qkv_bias), mlp=experts)


FAMILY = decoder_family(Qwen2MoeLayer, windows=windows_by_type)
