"""Learn how much of each fine-tuned expert goes where, and fold it into one checkpoint.

For a model in memory, a pytree of any kind, `merge` does it in one call and returns a `Merged`;
`fold` does it again by coefficients that are there. The core that these are made of takes any
pytree of parameters:

- `task_vectors`: what each expert changed in the base; `DenseDelta`, `LowRankDelta` hold it.
- `mix`, `materialize`: from coefficients to a merged model; a `Mixture` is one lazy parameter.
- `granularities`, `CONSTRAINTS`: which parameters share a coefficient, which values it may take.
- `objectives`, `regularizers`, `interference`: what is minimised, and what is done before.
- `ArrayExamples`, `ask_expert`, `calibrate`: the data, what experts say of it, batches of it.
- `make_learner`, `Frozen`, `learn`: the steps; `Learner` and `Learned` are what they return.

For Hugging Face checkpoints a recipe says all of it: `load_recipe`, `parse_recipe` and `Recipe`.
`run_recipe` does what `adamerge learn` does and returns a `Run`; `prepare` reads models and data
and returns a `Prepared`, whose task vectors and forward are for loops of one's own, and whose
`learn` returns a `MergeResult`. A `Row` is a line of a table of results. A recipe may name
functions of one's own that `extension` marks. `quickstart` makes four experts to try things with.

`Coefficients` are the file that a run leaves: `layer_means` and `coefficients_figure` show what is
in it, `compare` what differs from another. Whatever the user gave that cannot be used is an
`InputError`.

Shapes are written with K experts, G groups or layers of a stack, L stacked layers, B examples, T
tokens, C classes and H features. Coefficients have no unit; objectives are in nats where they are
entropies.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adamerge_jax.moved import find_old_names

if TYPE_CHECKING:
    from adamerge_jax import interference, objectives, quickstart
    from adamerge_jax.coefficients import granularities
    from adamerge_jax.coefficients.constraints import CONSTRAINTS
    from adamerge_jax.coefficients.file import Coefficients
    from adamerge_jax.data.arrays import ArrayExamples
    from adamerge_jax.data.batches import calibrate
    from adamerge_jax.data.expert_targets import ask_expert
    from adamerge_jax.errors import InputError
    from adamerge_jax.learning.learner import Frozen, Learner, make_learner
    from adamerge_jax.learning.loop import Learned, learn
    from adamerge_jax.mixing import Mixture, materialize, mix
    from adamerge_jax.objectives import regularizers
    from adamerge_jax.own_model.folding import fold
    from adamerge_jax.own_model.merged import Merged
    from adamerge_jax.own_model.merging import merge
    from adamerge_jax.own_model.recipe import Prepared, prepare, run_recipe
    from adamerge_jax.pipeline.ended_run import Run
    from adamerge_jax.pipeline.learn import MergeResult
    from adamerge_jax.recipes.loading import load_recipe, parse_recipe
    from adamerge_jax.recipes.schema import Recipe
    from adamerge_jax.registry import extension
    from adamerge_jax.report.coefficients import layer_means
    from adamerge_jax.report.comparison import compare
    from adamerge_jax.report.maps import coefficients_figure
    from adamerge_jax.runs.rows import Row
    from adamerge_jax.task_vectors import DenseDelta, LowRankDelta, task_vectors

find_old_names()

__version__: str

_HOMES = {
    "CONSTRAINTS": "coefficients.constraints",
    "ArrayExamples": "data.arrays",
    "Coefficients": "coefficients.file",
    "DenseDelta": "task_vectors",
    "Frozen": "learning.learner",
    "InputError": "errors",
    "Learned": "learning.loop",
    "Learner": "learning.learner",
    "LowRankDelta": "task_vectors",
    "MergeResult": "pipeline.learn",
    "Merged": "own_model.merged",
    "Mixture": "mixing",
    "Prepared": "own_model.recipe",
    "Recipe": "recipes.schema",
    "Row": "runs.rows",
    "Run": "pipeline.ended_run",
    "ask_expert": "data.expert_targets",
    "calibrate": "data.batches",
    "coefficients_figure": "report.maps",
    "compare": "report.comparison",
    "extension": "registry",
    "fold": "own_model.folding",
    "granularities": "coefficients",
    "interference": "",
    "layer_means": "report.coefficients",
    "learn": "learning.loop",
    "load_recipe": "recipes.loading",
    "make_learner": "learning.learner",
    "materialize": "mixing",
    "merge": "own_model.merging",
    "mix": "mixing",
    "objectives": "",
    "parse_recipe": "recipes.loading",
    "prepare": "own_model.recipe",
    "quickstart": "",
    "regularizers": "objectives",
    "run_recipe": "own_model.recipe",
    "task_vectors": "task_vectors",
}
"""The module of each public name: imported when the name is asked for, so that a command which
needs little starts at once."""

__all__ = [
    "CONSTRAINTS",
    "ArrayExamples",
    "Coefficients",
    "DenseDelta",
    "Frozen",
    "InputError",
    "Learned",
    "Learner",
    "LowRankDelta",
    "MergeResult",
    "Merged",
    "Mixture",
    "Prepared",
    "Recipe",
    "Row",
    "Run",
    "ask_expert",
    "calibrate",
    "coefficients_figure",
    "compare",
    "extension",
    "fold",
    "granularities",
    "interference",
    "layer_means",
    "learn",
    "load_recipe",
    "make_learner",
    "materialize",
    "merge",
    "mix",
    "objectives",
    "parse_recipe",
    "prepare",
    "quickstart",
    "regularizers",
    "run_recipe",
    "task_vectors",
]


if not TYPE_CHECKING:  # a type checker is to refuse other names

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("adamerge_jax")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if _HOMES[name]:
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
            value = getattr(home, name, None) or importlib.import_module(f"{home.__name__}.{name}")
        else:
            value = importlib.import_module(f"{__name__}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps the function `task_vectors`, in whose place importing the room would put the room."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "task_vectors" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
