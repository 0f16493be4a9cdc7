"""Qwen 3 with a mixture of experts in every layer (Qwen Team, 2025)."""

from adamerge_jax.errors import InputError
from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, RMSNorm, decoder_family
from adamerge_jax.models.experts import MixtureOfExperts
from adamerge_jax.models.layers import Config


def require_experts_everywhere(config: Config) -> None:
    """Refuses configs of which some layers have an MLP instead of experts.

    Raises:
        InputError: The layers are not alike.
    """
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise InputError(
            "config.json: layers without experts (mlp_only_layers "
            f"{config.mlp_only_layers}, decoder_sparse_step {config.decoder_sparse_step}) are not "
            "supported; supported are [] and 1"
        )


class Qwen3MoeLayer(PreNormLayer):
    def __init__(self, config: Config):
        require_experts_everywhere(config)
        bias = config.attention_bias
        experts = MixtureOfExperts(
            config,
            config.num_experts,
            config.moe_intermediate_size,
            normalised=config.norm_topk_prob,
        )
        attention = Attention(config, bias=bias, output_bias=bias, norm=RMSNorm)
        super().__init__(config, attention, mlp=experts)


FAMILY = decoder_family(
    Qwen3MoeLayer, windows=lambda config: [config.sliding_window] * config.num_hidden_layers
)
