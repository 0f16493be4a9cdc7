"""Learn how much of each fine-tuned expert goes where, and fold it into one checkpoint.

The core takes any pytree of parameters:

- `task_vectors`: what each expert changed in the base; `DenseDelta`, `LowRankDelta` hold it.
- `mix`, `materialize`: from coefficients to a merged model; a `Mixture` is one lazy parameter.
- `granularities`, `CONSTRAINTS`: which parameters share a coefficient, which values it may take.
- `objectives`, `regularizers`, `interference`: what is minimised, and what is done before.
- `ArrayExamples`, `ask_expert`, `calibrate`: the data, what experts say of it, batches of it.
- `make_learner`, `Frozen`, `learn`: the steps; `Learner` and `Learned` are what they return.

For Hugging Face checkpoints a recipe says all of it: `load_recipe`, `parse_recipe` and `Recipe`,
with `adamerge_jax.jobs` to run one, and `Coefficients`, the file that a run leaves. Whatever the
user gave that cannot be used is an `InputError`.

Shapes are written with K experts, G groups or layers of a stack, L stacked layers, B examples, T
tokens, C classes and H features. Coefficients have no unit; objectives are in nats where they are
entropies.
"""

import logging

# Said on import wherever PyTorch is missing, and of no use here: nothing needs PyTorch.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

from adamerge_jax import granularities, interference, objectives, regularizers
from adamerge_jax.calibration import calibrate
from adamerge_jax.coefficients import CONSTRAINTS, Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.examples import ArrayExamples
from adamerge_jax.learning import Frozen, Learned, Learner, learn, make_learner
from adamerge_jax.mixing import Mixture, materialize, mix
from adamerge_jax.recipes import Recipe, load_recipe, parse_recipe
from adamerge_jax.targets import ask_expert
from adamerge_jax.task_vectors import DenseDelta, LowRankDelta, task_vectors

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
    "Mixture",
    "Recipe",
    "ask_expert",
    "calibrate",
    "granularities",
    "interference",
    "learn",
    "load_recipe",
    "make_learner",
    "materialize",
    "mix",
    "objectives",
    "parse_recipe",
    "regularizers",
    "task_vectors",
]
