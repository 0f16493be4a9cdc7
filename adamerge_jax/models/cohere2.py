"""Command R7B and A (Cohere, 2024): a Command R of which most layers see a window of the text.

The layers that see all of it have no positions.
"""

from adamerge_jax.models.cohere import CohereHead, CohereLayer
from adamerge_jax.models.decoder_layers import CentredNorm, decoder_family, windows_by_type
from adamerge_jax.models.layers import Config
from adamerge_jax.models.rotary import Rotary


def rotaries(config: Config) -> list[Rotary]:
    """Returns each layer's rotation: none for those that see all of the text."""
    rotary = Rotary.of(config)
    return [rotary if window else rotary.still() for window in windows_by_type(config)]


FAMILY = decoder_family(
    CohereLayer, windows=windows_by_type, rotaries=rotaries, norm=CentredNorm, head=CohereHead
)
