"""Names of tasks, from the paths of their experts."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from adamerge_jax.errors import InputError

_SAYS_NOTHING = re.compile(
    r"(checkpoint|step|epoch)[-_]?\d+|(final|best|last|latest)([-_]?(model|checkpoint))?"
    r"|model|merged|adapter|output|out|lora|expert",
    re.IGNORECASE,
)
"""Names of folders that training writes into, which are none of a task."""

_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")

_MODEL_FILES = ("config.json", "adapter_config.json", "model_index.json", "modules.json")
"""Files of which the folder of a model or adapter has one."""


def expand(paths: Sequence[str]) -> list[str]:
    """Returns the paths, a folder of experts replaced by the experts in it.

    Args:
        paths: Folders, files or Hub names.
    """
    expanded = []
    for path in paths:
        folder = Path(path).expanduser()
        inside: list[Path] = []
        if folder.is_dir() and not _is_model(folder):
            inside = sorted(child for child in folder.iterdir() if _is_model(child))
        # The checkpoints of one training run are no experts of several tasks.
        if any(_SAYS_NOTHING.fullmatch(child.name) for child in inside):
            inside = []
        expanded += [str(child) for child in inside] or [path]
    return expanded


def task_names(experts: Sequence[str]) -> list[str]:
    """Returns a name for the task of each expert: that of its folder, or of one above it.

    Args:
        experts: Folders, files or Hub names.

    Raises:
        InputError: Two experts are the same folder.
    """
    if len(set(experts)) < len(experts):
        twice = next(expert for expert in experts if list(experts).count(expert) > 1)
        raise InputError(f"the expert {twice} is given twice")
    parts = [_parts(expert) for expert in experts]
    names = [own[-1] for own in parts]
    # Folders of one name lie in folders of several.
    for depth in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["-".join(own[-depth:]) for own in parts]
    names = [name if name != "base" else "base-task" for name in names]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, 1)]
    return names


def _parts(expert: str) -> list[str]:
    """Returns the names in a path that can be those of a task, at least one."""
    path = Path(expert).expanduser()
    pure = PurePath(path.resolve() if path.exists() else expert)
    names = [*pure.parts[:-1], pure.stem if pure.suffix in (".gguf", ".safetensors") else pure.name]
    while len(names) > 1 and _SAYS_NOTHING.fullmatch(names[-1]):
        names.pop()
    cleaned = (_NOT_IN_A_NAME.sub("-", name).strip("-.+") for name in names)
    return [name for name in cleaned if name] or ["task"]


def _is_model(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _MODEL_FILES)
