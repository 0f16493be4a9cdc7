"""Linear classifiers and their experts: small enough that a merge of them takes no time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TASKS = ("law", "medicine")
_DRAWS = np.random.default_rng(0)
INPUTS = _DRAWS.normal(size=(40, 6)).astype(np.float32)
BASE = {
    "body": {"kernel": jnp.asarray(_DRAWS.normal(size=(6, 5)), jnp.float32), "bias": jnp.zeros(5)},
    "out": {"kernel": jnp.asarray(_DRAWS.normal(size=(5, 3)), jnp.float32)},
    "steps": jnp.array(7),
}
EXPERTS = {
    task: jax.tree.map(
        lambda leaf: leaf + jnp.asarray(_DRAWS.normal(size=leaf.shape) / 2, leaf.dtype), BASE
    )
    for task in TASKS
}
DATA = dict.fromkeys(TASKS, INPUTS)
LABELLED = {task: (INPUTS, np.zeros(len(INPUTS), int)) for task in TASKS}
QUICK: dict[str, Any] = {"steps": 2, "granularity": "task", "progress": False}


def forward(parameters: Any, inputs: jax.Array) -> jax.Array:
    hidden = jnp.tanh(inputs @ parameters["body"]["kernel"] + parameters["body"]["bias"])
    return hidden @ parameters["out"]["kernel"]
