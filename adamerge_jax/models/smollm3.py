"""SmolLM 3 (Hugging Face, 2025): a Llama of which some layers have no positions."""

from adamerge_jax.models.decoder_layers import decoder_family, windows_by_type
from adamerge_jax.models.layers import Config
from adamerge_jax.models.llama import LlamaLayer
from adamerge_jax.models.rotary import Rotary


def rotaries(config: Config) -> list[Rotary]:
    """Returns each layer's rotation: none where `no_rope_layers` has a 0."""
    rotary = Rotary.of(config)
    flags = config.no_rope_layers[: config.num_hidden_layers]
    return [rotary if turns else rotary.still() for turns in flags]


def windows(config: Config) -> list[int | None]:
    """Returns the number of tokens that each layer sees, None for all."""
    if config.use_sliding_window:
        return windows_by_type(config)
    return [None] * config.num_hidden_layers


FAMILY = decoder_family(LlamaLayer, windows=windows, rotaries=rotaries)
