"""Rematerialisation: the values that the backward pass computes again rather than keeps."""

from typing import Literal

Rematerialize = Literal["nothing", "weights", "elementwise", "layer"]
"""The values that are computed again, from fastest to smallest.

- `nothing`: every intermediate value is kept, merged weights included.
- `weights`: merged weights are mixed again.
- `elementwise`: only outputs of linear layers and of attention are kept; mixing, normalisation,
  activations and attention scores are computed again.
- `layer`: only the input of each layer is kept.
"""
