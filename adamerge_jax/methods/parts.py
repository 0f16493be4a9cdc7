"""Parts of a model whose arrays are held together."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_parts(items: Iterable[T], bytes_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yields items in order, as many together as fit into `most` bytes, at least one.

    Args:
        items: The items.
        bytes_of: The size of an item.
        most: The largest size of the items that are held together.
    """
    part: list[T] = []
    size = 0
    for item in items:
        if part and size + bytes_of(item) > most:
            yield part
            part, size = [], 0
        part.append(item)
        size += bytes_of(item)
    if part:
        yield part
