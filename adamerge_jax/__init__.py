"""Learn how much of each fine-tuned expert goes where, and fold it into one checkpoint."""

import logging

# Said on import wherever PyTorch is missing, and of no use here: nothing needs PyTorch.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

from adamerge_jax.coefficients import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.learning import Frozen, Learned, Learner, learn, make_learner
from adamerge_jax.mixing import Mixture, materialize, mix
from adamerge_jax.recipes import Recipe, load_recipe, parse_recipe
from adamerge_jax.task_vectors import DenseDelta, task_vectors

__all__ = [
    "Coefficients",
    "DenseDelta",
    "Frozen",
    "InputError",
    "Learned",
    "Learner",
    "Mixture",
    "Recipe",
    "learn",
    "load_recipe",
    "make_learner",
    "materialize",
    "mix",
    "parse_recipe",
    "task_vectors",
]
