"""The commands by name, in the groups of the help."""

from adamerge_jax.cli.coefficients_commands import Coarsen, Compare, Inspect, Mergekit
from adamerge_jax.cli.first_commands import FromMergekit, New, Quickstart, Schema
from adamerge_jax.cli.recipe_commands import (
    CompareMethods,
    Evaluate,
    Fold,
    Front,
    Learn,
    Merge,
    Plan,
    Search,
)
from adamerge_jax.cli.run_commands import Push, Report

GROUPS: dict[str, dict[str, type]] = {
    "begin": {
        "quickstart": Quickstart,
        "new": New,
        "from-mergekit": FromMergekit,
        "schema": Schema,
    },
    "merge": {
        "plan": Plan,
        "learn": Learn,
        "search": Search,
        "front": Front,
        "merge": Merge,
        "compare-methods": CompareMethods,
    },
    "look at results": {
        "evaluate": Evaluate,
        "report": Report,
        "inspect": Inspect,
        "compare": Compare,
    },
    "use and publish": {
        "fold": Fold,
        "coarsen": Coarsen,
        "mergekit": Mergekit,
        "push": Push,
    },
}
"""The commands by name, in the groups of the help."""

COMMANDS: dict[str, type] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}
"""The commands by name."""
