"""Heads that give any number of labels."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adamerge_jax.models.network import Network


class LabelsHead(Network):
    """A head of labels that do not exclude each other: `(parameters, outputs) -> [B, C, 2]`."""

    def __init__(self, head: Network):
        """Wraps a head of one logit for each label."""
        self.shapes = head.shapes
        self._head = head

    def __call__(self, parameters: Mapping[str, Array], *arguments: PyTree, **options: Any) -> Any:
        """Returns the logits of the choice between none and each label: 0, and the head's."""
        logits = self._head(parameters, *arguments, **options)
        return jnp.stack([jnp.zeros_like(logits), logits], axis=-1)

    def is_same(self, other: object) -> bool:
        """Returns True if the other is the same function of parameters."""
        return isinstance(other, LabelsHead) and self._head.is_same(other._head)
