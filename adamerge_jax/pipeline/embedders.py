"""The one way from texts to embeddings of sentence embedders that are merged."""

import dataclasses
from collections.abc import Mapping

from adamerge_jax.checkpoints.sentence_modules import MODULES_FILE
from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import EmbeddingForm

_SHARED = ("pooling", "normalised", "lowercase", "prompts", "default_prompt", "similarity")
"""The parts of the form that all experts of a merge have in common."""


def shared_form(forms: Mapping[str, EmbeddingForm | None]) -> EmbeddingForm | None:
    """Returns the way from texts to embeddings of a merge.

    Args:
        forms: The way of each expert by task; None for an expert that is no sentence embedder.

    Returns:
        The way of all; None if no expert is a sentence embedder. Texts are cut to as many tokens
        as all experts read.

    Raises:
        InputError: Only some experts are sentence embedders, or they differ.
    """
    (first, form), *others = forms.items()
    for task, other in others:
        if (form is None) != (other is None):
            embedder, classifier = (task, first) if form is None else (first, task)
            raise InputError(
                f"expert {embedder!r} is a sentence embedder (it has a {MODULES_FILE}), expert "
                f"{classifier!r} is none; save all of them with sentence-transformers, or leave "
                "one out"
            )
        for part in _SHARED if form is not None else ():
            if getattr(form, part) != getattr(other, part):
                raise InputError(
                    f"{part} of expert {first!r} is {getattr(form, part)!r}, that of expert "
                    f"{task!r} is {getattr(other, part)!r}; a merge has one way from texts to "
                    "embeddings: give all experts the same module files, or leave one out"
                )
    if form is None:
        return None
    lengths = [other.max_tokens for other in forms.values() if other and other.max_tokens]
    return dataclasses.replace(form, max_tokens=min(lengths, default=None))
