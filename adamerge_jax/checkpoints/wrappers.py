"""Names of tensors as the wrappers of training loops change them, and without the wrappers."""

from collections.abc import Iterable, Iterator

# torch.compile, FSDP and activation checkpointing wrap single modules too.
_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# DataParallel, DeepSpeed's engines, Lightning's modules (whose attribute is often called model).
_PREFIXES = ("module.", "_forward_module.", "base_model.model.", "model.")


def without_marks(name: str) -> str:
    """Returns a name without the marks that wrappers leave at any place in it."""
    for mark in _MARKS:
        name = name.replace(mark, "")
    return name


def unwrapped(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields names as they are, then with one wrapper less each time.

    A prefix is taken off only where all names have it, so that names stay different.

    Args:
        names: The names of all tensors of a checkpoint.

    Yields:
        The names in the file by the names without wrappers.
    """
    current = {name: name for name in names}
    yield current
    unmarked = {without_marks(name): name for name in current}
    if unmarked != current and len(unmarked) == len(current):
        current = unmarked
        yield current
    while prefix := _shared_prefix(current):
        current = {name.removeprefix(prefix): in_file for name, in_file in current.items()}
        yield current


def _shared_prefix(names: Iterable[str]) -> str | None:
    """Returns the prefix of a wrapper that all names have and that is not all of a name."""
    names = list(names)
    return next(
        (
            prefix
            for prefix in _PREFIXES
            if names and all(name.startswith(prefix) and name != prefix for name in names)
        ),
        None,
    )
