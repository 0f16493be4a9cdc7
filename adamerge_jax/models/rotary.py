"""Rotary position embeddings (Su et al., 2021), of every kind of scaling that `transformers` has.

A kind gives the angular speed of each pair of features; what differs between layers, such as no
positions at all, is another `Rotary`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.errors import InputError
from adamerge_jax.models.layers import Config

Speeds = Float[np.ndarray, " features/2"]
"""Radians per position of each pair of features, float32."""


def head_features(config: Config) -> int:
    """Returns the features of one head, which need not be the hidden size divided by the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys by their positions.

    Attributes:
        speeds: Radians per position of each pair of features that turns.
        long_speeds: Those for texts of more than `context` tokens.
        context: The longest text that `speeds` are for, in tokens; None for any.
        amplitude: The factor of cosines and sines, which makes attention sharper.
    """

    speeds: tuple[float, ...]
    long_speeds: tuple[float, ...] = ()
    context: int | None = None
    amplitude: float = 1.0

    @classmethod
    def of(
        cls, config: Config, layer_type: str | None = None, *, partial: bool = False
    ) -> "Rotary":
        """Reads a config's rotary positions, those of one type of layer where types differ.

        Args:
            config: The model's config.
            layer_type: The type of layer, where `rope_parameters` have an entry for each.
            partial: True for an architecture whose heads may turn only their first features.

        Raises:
            InputError: The config asks for a kind of scaling that `transformers` does not have,
                or for heads that turn in part where the architecture's turn whole.
        """
        settings = config.rope_parameters
        settings = settings[layer_type] if layer_type else settings
        kind = settings["rope_type"]
        if kind not in KINDS:
            raise InputError(
                f"config.json: rope_type {kind!r} is not supported; "
                f"supported are {', '.join(KINDS)}"
            )
        share = settings.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not partial:
            raise InputError(
                f"config.json: partial_rotary_factor is {share!r}; "
                f"the heads of a {config.model_type} rotate whole"
            )
        features = head_features(config)
        if kind != "proportional":
            features = int(features * share)
        try:
            return KINDS[kind](config, settings, features)
        except KeyError as error:
            raise InputError(
                f"config.json: rope_parameters of rope_type {kind!r} lack {error.args[0]!r}"
            ) from None

    def still(self) -> "Rotary":
        """Returns the rotation by nothing, of layers without positions."""
        return Rotary((0.0,) * len(self.speeds))

    def table(self, length: int) -> Float[Array, "2 T features/2"]:
        """Returns cosines and sines of the angles at positions 0 to `length - 1`.

        Args:
            length: The tokens of the text, which also says whether it is a long one.
        """
        is_long = self.context is not None and length > self.context
        speeds = np.array(self.long_speeds if is_long else self.speeds, np.float32)
        positions = jnp.arange(length, dtype=jnp.float32)
        angles = positions[:, None] * speeds
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * np.float32(self.amplitude)


Settings = Mapping[str, Any]
"""The `rope_parameters` of a config, those of one type of layer."""


def _frequencies(theta: float, features: int, whole: int | None = None) -> Speeds:
    """Returns the speeds of unscaled positions, in float32 as PyTorch computes them."""
    exponents = np.arange(0, features, 2, dtype=np.float32) / np.float32(whole or features)
    return 1 / np.float32(theta) ** exponents


def _numbers(speeds: Speeds) -> tuple[float, ...]:
    return tuple(speeds.astype(np.float32).tolist())


def _default(config: Config, settings: Settings, features: int) -> Rotary:
    return Rotary(_numbers(_frequencies(settings["rope_theta"], features)))


def _linear(config: Config, settings: Settings, features: int) -> Rotary:
    """Stretches all wavelengths by `factor`."""
    speeds = _frequencies(settings["rope_theta"], features)
    return Rotary(_numbers(speeds / np.float32(settings["factor"])))


def _dynamic(config: Config, settings: Settings, features: int) -> Rotary:
    """Stretches nothing: only texts longer than `max_position_embeddings` would be stretched.

    Those are refused when they are read.
    """
    return _default(config, settings, features)


def _proportional(config: Config, settings: Settings, features: int) -> Rotary:
    """Turns the first pairs of features alone, at the speeds that they have in a whole head."""
    turning = int(settings.get("partial_rotary_factor", 1.0) * features // 2)
    speeds = _frequencies(settings["rope_theta"], 2 * turning, features)
    still = np.zeros(features // 2 - turning, np.float32)
    scaled = np.concatenate([speeds, still]) / np.float32(settings.get("factor", 1.0))
    return Rotary(_numbers(scaled))


def _llama3(config: Config, settings: Settings, features: int) -> Rotary:
    """Stretches the longer wavelengths (Llama 3.1).

    Those that fit less than `low_freq_factor` times into the context of pretraining are stretched,
    those that fit more than `high_freq_factor` times are not; in between speeds are interpolated.
    """
    fast = _frequencies(settings["rope_theta"], features)
    slow = fast / np.float32(settings["factor"])
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * fast / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return Rotary(_numbers((1 - share) * slow + share * fast))


def _yarn(config: Config, settings: Settings, features: int) -> Rotary:
    """Stretches the longer wavelengths and sharpens attention (YaRN, Peng et al., 2023)."""
    theta, context = settings["rope_theta"], settings["original_max_position_embeddings"]
    factor = settings["factor"] or config.max_position_embeddings / context

    def pair_that_turns(times: float) -> float:
        """Returns the number, not whole, of the pair that turns so often in the context."""
        return features * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(settings.get("beta_fast") or 32)
    last = pair_that_turns(settings.get("beta_slow") or 1)
    # As `transformers`, which reads this one outside of the layer type's entry.
    if config.rope_parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, features - 1)
    if first == last:
        last += 0.001
    pairs = np.arange(features // 2, dtype=np.float32)
    stretched = np.clip((pairs - first) / (last - first), 0, 1)
    fast = _frequencies(theta, features)
    speeds = fast / np.float32(factor) * stretched + fast * (1 - stretched)

    amplitude = settings.get("attention_factor")
    if amplitude is None:
        scale, scale_of_all = settings.get("mscale"), settings.get("mscale_all_dim")
        if scale and scale_of_all:
            amplitude = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_of_all)
        else:
            amplitude = _yarn_scale(factor, 1.0)
    return Rotary(_numbers(speeds), amplitude=amplitude)


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(config: Config, settings: Settings, features: int) -> Rotary:
    """Stretches each wavelength by a factor of its own (LongRoPE, Ding et al., 2024)."""
    context = settings["original_max_position_embeddings"]
    fast = _frequencies(settings["rope_theta"], features)

    def stretched(name: str) -> tuple[float, ...]:
        factors = np.array(settings[name], np.float32)
        if len(factors) != len(fast):
            raise InputError(
                f"config.json: rope_parameters have {len(factors)} numbers in {name}, "
                f"expected {len(fast)}, one for each pair of features that turns"
            )
        return _numbers(fast / factors)

    factor = settings.get("factor") or config.max_position_embeddings / context
    amplitude = settings.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return Rotary(stretched("short_factor"), stretched("long_factor"), context, amplitude)


KINDS: dict[str, Callable[[Config, Settings, int], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
"""Makes a rotation from a config, its settings and the features of a head, by `rope_type`."""


def require_one_rotation(config: Config, read: int, places: int) -> None:
    """Refuses a text that is short when it is first read and long when it is finished.

    Args:
        config: The model's config.
        read: The tokens of the prompt.
        places: The tokens of the finished text.

    Raises:
        InputError: Its cached keys would be turned in two ways.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    if settings.get("rope_type") != "longrope":
        return
    context = settings["original_max_position_embeddings"]
    if read <= context < places:
        raise InputError(
            f"config.json: rope_type 'longrope' turns texts of up to {context} tokens and longer "
            f"ones differently, and a prompt of {read} tokens is to grow to {places}; "
            "make prompts or max_new_tokens shorter"
        )
