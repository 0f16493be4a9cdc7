"""Matches a coefficients file to models for a fold: experts in any order, scaled or left out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.identities import namesake, other_contents
from adamerge_jax.errors import InputError, in_hand
from adamerge_jax.pipeline.fold import require_fitting
from adamerge_jax.pipeline.models import Models


class Fold(NamedTuple):
    """The coefficients and the models of a fold.

    Attributes:
        coefficients: The coefficients of the file, scaled; without the experts that are left out,
            unless interference steps or an initial merge need them.
        models: The base and the experts of these coefficients, in their order; tensors that the
            file does not mix are among the kept ones.
        notes: Notes for the user, a sentence each.
    """

    coefficients: Coefficients
    models: Models
    notes: tuple[str, ...]


def prepare_fold(
    file: Path,
    models: Models,
    *,
    scale: Mapping[str, float] | None = None,
    allow_other_models: bool = False,
) -> Fold:
    """Finds the models that a coefficients file was learned for, by name and identity.

    Args:
        file: The coefficients.
        models: The base and experts of a recipe, in any order. An expert that is left out may be
            missing, unless there are interference steps: these depend on all experts.
        scale: The factor of each expert's coefficients; 0 leaves the expert out.
        allow_other_models: If True, models with other contents than those that the file was
            learned for give a note rather than an error.

    Raises:
        InputError: The file cannot be read, an expert is missing, unknown or another model, a
            factor is no number, or the base has other tensors.
    """
    with in_hand(file):
        coefficients = Coefficients.load(file)
    if scale:
        coefficients = coefficients.times(scale)
    expert_names, (_, *experts) = list(models.experts), models.sources
    for name in expert_names:
        if name not in coefficients.names:
            raise InputError(
                f"{file} has no coefficients for {name!r}; it was learned for "
                f"{', '.join(coefficients.names)}: take {name!r} out of the recipe, or learn with "
                "coefficients.start, which begins with this file"
            )
    needed = set(coefficients.names)
    if not coefficients.needs_all_experts:
        needed -= coefficients.left_out
    for expert in coefficients.experts:
        if expert.name in needed and expert.name not in expert_names:
            advice = f"add it, or leave it out of the merge with --scale {expert.name}=0"
            if coefficients.initial_merge is not None:
                advice = f"the merge by {coefficients.initial_merge.in_words} needs it: add it"
            if expert.name in coefficients.left_out:
                advice = "interference steps need every expert, also one that is left out: add it"
            raise InputError(
                f"{file} was learned for {', '.join(coefficients.names)}; the recipe has no "
                f"{expert.name!r}{namesake(expert, experts)}; {advice}"
            )
    differences = other_contents((coefficients.base, *coefficients.experts), models.sources)
    if differences and not allow_other_models:
        raise InputError(
            f"{file} was {'; it was '.join(differences.values())}; "
            "--allow-other-models folds all the same"
        )
    require_fitting(models, coefficients)
    notes = [f"{file} was {difference}" for difference in differences.values()]
    if unmixed := [name for name in coefficients.shapes if name in models.kept_from_base]:
        notes.append(
            f"{len(unmixed)} of the {len(coefficients.shapes)} tensors that {file} mixes stay the "
            f"base's, such as {unmixed[0]}: keep_from_base says so, or an expert has none"
        )
    order = [name for name in coefficients.names if name in needed]
    base, by_name = models.sources[0], {source.name: source for source in experts}
    return Fold(
        coefficients if coefficients.needs_all_experts else coefficients.of_experts(order),
        dataclasses.replace(
            models,
            experts={name: models.experts[name] for name in order},
            sources=(base, *(by_name[name] for name in order)),
            kept_from_base=models.kept_from_base
            | (models.base.names.keys() - coefficients.shapes.keys()),
        ),
        tuple(notes),
    )


def parse_scale(factors: Sequence[str]) -> dict[str, float]:
    """Reads factors by expert, each written as `trec=0.5`.

    Raises:
        InputError: A text is not a name, `=` and a number, or a name comes twice.
    """
    scale: dict[str, float] = {}
    for text in factors:
        name, _, number = text.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = None
        if not name or factor is None:
            raise InputError(f"--scale: found {text!r}; expected an expert and a factor: trec=0.5")
        if name in scale:
            raise InputError(f"--scale: {name!r} is given twice")
        scale[name] = factor
    return scale
