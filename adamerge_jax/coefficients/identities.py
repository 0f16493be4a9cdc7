"""Whether models are those that coefficients were learned for."""

from collections.abc import Iterable

from adamerge_jax.coefficients.file import Source


def other_contents(learned_for: Iterable[Source], found: Iterable[Source]) -> dict[str, str]:
    """Which models have the name of one that coefficients were learned for, and other contents.

    Args:
        learned_for: The models of a coefficients file.
        found: The models at hand, in any order.

    Returns:
        By name, the difference in words.
    """
    own = {source.name: source for source in found}
    return {
        source.name: (
            f"learned for {source.name} = {source.in_words}; "
            f"{own[source.name].in_words} has other contents"
        )
        for source in learned_for
        if source.name in own and own[source.name].identity != source.identity
    }


def namesake(source: Source, others: Iterable[Source]) -> str:
    """The name under which others have the very same model, as a hint in a message; often empty."""
    for other in others:
        if other.identity == source.identity and other.name != source.name:
            return f" ({other.name!r} is that very model: call it {source.name!r})"
    return ""
