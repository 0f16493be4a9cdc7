"""Entities in texts whose words have classes such as B-person, I-person and O."""

import re
from collections.abc import Sequence

OUTSIDE = "O"
"""The tag of words in no entity."""

_TAG = re.compile(r"([BIELSU])-(.+)", re.DOTALL)

_ALIASES = {"L": "E", "U": "S"}
"""The last word of an entity and the only one, which some call by other letters."""

Entity = tuple[str, int, int]
"""The type of an entity, and the places of its first and its last word."""


def tells_entities(class_names: Sequence[str]) -> bool:
    """Returns True if classes are those of a scheme of entities: BIO, IOB, BIOES or BILOU."""
    others = [name for name in class_names if name != OUTSIDE]
    return bool(others) and len(others) < len(class_names) and all(map(_TAG.fullmatch, others))


def entities_of(tags: Sequence[str]) -> set[Entity]:
    """Returns the entities of a text, by the rules of the evaluation of CoNLL-2000.

    An entity begins at B and S, and at any tag that continues none of its own type: behind O,
    behind the end of an entity, or behind a word of another type.

    Args:
        tags: The tag of each word.

    Examples:
        >>> sorted(entities_of(["B-place", "I-place", "O", "I-person"]))
        [('person', 3, 3), ('place', 0, 1)]
    """
    entities = set()
    start, before, type_before = 0, OUTSIDE, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, type_here = _parts(tag)
        continues = letter in "IE" and before in "BI" and type_here == type_before
        if not continues:
            if before != OUTSIDE:
                entities.add((type_before, start, place - 1))
            start = place
        before, type_before = letter, type_here
    return entities


def _parts(tag: str) -> tuple[str, str]:
    """Returns the letter and the type of a tag; of any other class those of no entity."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return OUTSIDE, ""
    return _ALIASES.get(match[1], match[1]), match[2]
