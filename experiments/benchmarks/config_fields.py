"""Fields of a config and of the configs in it."""

from typing import Any


def parts_of(config: Any) -> list[Any]:
    """Returns a config and those in it."""
    parts = [config]
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            parts.extend(parts_of(part))
    return parts


def first_of(config: Any, *names: str) -> Any:
    """Returns the first field with one of the names, in a config or in its parts; None if none."""
    for name in names:
        for part in parts_of(config):
            if (value := getattr(part, name, None)) is not None:
                return value
    return None
