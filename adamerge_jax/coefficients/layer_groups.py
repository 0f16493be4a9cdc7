"""Groups of neighbouring layers, for the granularity `groups`."""

from collections.abc import Iterable

import numpy as np

from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import layer_of, matches, numbered_block

_BEFORE_BLOCKS = ("*embed*", "shared", "*pre_*", "*patch*")
"""Layers without a number that stand before the numbered blocks; all others stand behind them."""


def layer_group_patterns(names: Iterable[str], count: int) -> dict[str, list[str]]:
    """Returns the patterns of groups of neighbouring layers, as even in size as can be.

    Embeddings go with the first blocks, a final norm or a pooler with the last ones.

    Args:
        names: Names of tensors, without `*`.
        count: The number of groups.

    Raises:
        InputError: There are fewer layers than groups.
    """
    tensors = list(names)
    layers = dict.fromkeys(layer_of(name, tensors) for name in tensors)
    blocks = sorted((layer for layer in layers if numbered_block(layer)), key=_place)
    others = [layer for layer in layers if not numbered_block(layer)]
    if not blocks:
        blocks, others = others, []
    if count > len(blocks):
        raise InputError(
            f"search.layer_groups: {count} groups of {len(blocks)} layers cannot be made; give at "
            f"most {len(blocks)}"
        )
    groups = [list(part) for part in np.array_split(np.array(blocks, object), count)]
    before = [layer for layer in others if matches(layer, _BEFORE_BLOCKS)]
    groups[0] = [*before, *groups[0]]
    groups[-1] += [layer for layer in others if layer not in before]
    return {
        f"layers {number:0{len(str(count))}} of {count}": [
            pattern for layer in group for pattern in (layer, f"{layer}.*")
        ]
        for number, group in enumerate(groups, 1)
    }


def _place(layer: str) -> tuple[bool, str, int]:
    """Returns a key that sorts blocks as data go through them: an encoder's before a decoder's."""
    stack, _, number = layer.rpartition(".")
    return "decoder" in stack, stack, int(number)
