"""The choices of a recipe for sentence embedders, where presets are written for classes."""

from collections.abc import Sequence

from adamerge_jax.errors import InputError
from adamerge_jax.objectives import OBJECTIVES
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import ObjectiveRecipe, Recipe

OF_EMBEDDINGS = ("embedding_alignment", "contrastive")
"""The objectives that only sentence embedders have."""

_OF_BOTH = ("hidden_state_alignment",)

_IN_PLACE = {"logit_alignment": "embedding_alignment"}
"""The objectives of embeddings in place of those that presets have for classes."""

_PRESETS_BY_PAIRS = ("self-positioning",)
"""Presets whose papers learn from pairs of texts that belong together."""


def objectives_of_embedder(recipe: Recipe) -> Sequence[ObjectiveRecipe]:
    """Returns the terms that are minimised for sentence embedders.

    Args:
        recipe: The recipe. Where its objectives are its preset's, others take the place of those
            that are for classes.

    Raises:
        InputError: The recipe itself names an objective of classes, or nothing stands for one of
            its preset.
    """
    preset = PRESETS[recipe.preset]["objectives"]
    names_objectives = recipe.objectives != [
        ObjectiveRecipe.model_validate(term) for term in preset
    ]
    if not names_objectives and recipe.preset in _PRESETS_BY_PAIRS:
        return [ObjectiveRecipe(name="contrastive")]
    terms = []
    for position, term in enumerate(recipe.objectives):
        is_of_classes = term.name in OBJECTIVES and term.name not in (*OF_EMBEDDINGS, *_OF_BOTH)
        if not is_of_classes:
            terms.append(term)
        elif not names_objectives and term.name in _IN_PLACE:
            terms.append(ObjectiveRecipe(name=_IN_PLACE[term.name], weight=term.weight))
        else:
            field = f"objectives.{position}" if names_objectives else f"preset {recipe.preset}"
            raise InputError(
                f"{field}: {term.name} is for classes, and sentence embedders have none; take "
                f"{' or '.join(OF_EMBEDDINGS)}"
            )
    return terms
