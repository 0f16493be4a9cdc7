"""StableLM 2 (Stability AI, 2024): a Llama with centred norms whose heads turn in part."""

from adamerge_jax.errors import InputError
from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, decoder_family
from adamerge_jax.models.layers import Config, LayerNorm
from adamerge_jax.models.rotary import Rotary


class StableLMLayer(PreNormLayer):
    def __init__(self, config: Config):
        if config.qk_layernorm:
            raise InputError("config.json: qk_layernorm is true, which is not supported")
        super().__init__(
            config,
            Attention(config, bias=config.use_qkv_bias),
            norm=LayerNorm,
            parallel="shared" if config.use_parallel_residual else None,
        )


FAMILY = decoder_family(
    StableLMLayer,
    norm=LayerNorm,
    rotaries=lambda config: [Rotary.of(config, partial=True)] * config.num_hidden_layers,
)
