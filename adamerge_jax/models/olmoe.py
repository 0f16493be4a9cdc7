"""OLMoE (Muennighoff et al., 2024): a mixture of experts, norms on all heads' queries and keys."""

from adamerge_jax.errors import InputError
from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, RMSNorm, decoder_family
from adamerge_jax.models.experts import MixtureOfExperts
from adamerge_jax.models.layers import Config


class OlmoeLayer(PreNormLayer):
    def __init__(self, config: Config):
        if config.clip_qkv is not None:
            raise InputError(
                f"config.json: clip_qkv is {config.clip_qkv!r}, which is not supported; "
                "supported is null"
            )
        bias = config.attention_bias
        experts = MixtureOfExperts(
            config,
            config.num_experts,
            config.intermediate_size,
            normalised=config.norm_topk_prob,
        )
        attention = Attention(
            config, bias=bias, output_bias=bias, norm=RMSNorm, norm_of="projection"
        )
        super().__init__(config, attention, mlp=experts)


FAMILY = decoder_family(OlmoeLayer)
