"""Comparison of models with those that coefficients were learned for."""

from collections.abc import Iterable

from adamerge_jax.coefficients.file import Source


def other_contents(learned_for: Iterable[Source], models: Iterable[Source]) -> dict[str, str]:
    """Returns the models that have a name that coefficients were learned for, and other contents.

    Args:
        learned_for: The models of a coefficients file.
        models: The models at hand, in any order.

    Returns:
        By name, the difference in words.
    """
    by_name = {source.name: source for source in models}
    return {
        source.name: (
            f"learned for {source.name} = {source.in_words}; "
            f"{by_name[source.name].in_words} has other contents"
        )
        for source in learned_for
        if source.name in by_name and by_name[source.name].identity != source.identity
    }


def namesake(source: Source, others: Iterable[Source]) -> str:
    """Returns the name that others give to the very same model, as a hint; often nothing."""
    for other in others:
        if other.identity == source.identity and other.name != source.name:
            return f" ({other.name!r} is that very model: call it {source.name!r})"
    return ""
