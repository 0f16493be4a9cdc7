"""Modules that have moved: their old names can be imported for one release, with a warning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adamerge_jax.granularities": "adamerge_jax.coefficients.granularities",
    "adamerge_jax.jobs": "adamerge_jax.pipeline.run",
    "adamerge_jax.regularizers": "adamerge_jax.objectives.regularizers",
}
"""The new names of modules by their old ones."""


class _OldNames(MetaPathFinder, Loader):
    """Imports a module under its old name as the very same module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def find_old_names() -> None:
    """Has Python find moved modules by their old names from now on."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
