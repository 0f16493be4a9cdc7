"""The initial merge of a coefficients file: the merge to which its task vectors are added."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adamerge_jax.interference import FittedStep
from adamerge_jax.registry import choice_in_words


@dataclasses.dataclass(frozen=True)
class InitialMerge:
    """A merge without learning that takes the base's place as the start of a learned one.

    Attributes:
        name: The name of the method.
        options: Its options.
        interference: The method's own interference steps, fitted to all task vectors.
        stored: True for a method whose result depends on more than the models: the file then holds
            the merged tensors, which cannot be computed again.
    """

    name: str
    options: Mapping[str, Any]
    interference: tuple[FittedStep, ...] = ()
    stored: bool = False

    @property
    def in_words(self) -> str:
        """The method with its options, as people read it: `ties (density 0.3)`."""
        return choice_in_words(self.name, self.options)
