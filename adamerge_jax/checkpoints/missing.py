"""Experts that lack parameters of the base, in models that are known by names alone."""

import logging
from collections.abc import Sequence
from math import prod

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

log = logging.getLogger(__name__)


def require_most(
    base: MatchedCheckpoint, expert: MatchedCheckpoint, optional: Sequence[str]
) -> None:
    """Refuses an expert that lacks more than half of the base, and warns of one that lacks less.

    What an expert lacks stays the base's. That is meant where `transformers` drops layers that it
    does not run, and where a part was left out on purpose; else it is a damaged or another model.

    Args:
        base: The base.
        expert: The expert.
        optional: Patterns of parameters that are to stay the base's, which an expert may lack.

    Raises:
        InputError: More than half of all other parameters are missing, or of their values.
    """
    wanted = {name: prod(base.shape(name)) for name in base.names if not matches(name, optional)}
    lacking = [name for name in wanted if name not in expert.names]
    if not lacking:
        return
    share = sum(wanted[name] for name in lacking) / sum(wanted.values())
    message = (
        f"{expert.role} ({expert.checkpoint.source}) lacks {len(lacking)} of {len(wanted)} "
        f"parameters of the base, {100 * share:.3g}% of the values: {lacking[0]}"
        f"{and_more(len(lacking) - 1)}"
    )
    if share > 0.5 or len(lacking) > len(wanted) / 2:
        raise InputError(
            f"{message}; save the whole model, or list in keep_from_base what is to stay the base's"
        )
    log.warning("%s; they stay the base's", message)
