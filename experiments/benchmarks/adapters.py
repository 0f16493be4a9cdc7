"""Learning with LoRA adapters: `python experiments/benchmarks/adapters.py`.

On the same tokens, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of the base alone, nothing rematerialised: the gradient of the loss with
  respect to all its weights,
- (b) our learning step with 8 adapters of rank 16 on every matrix of the layers, kept as factors,
- (c) the same step with the same experts built out.

The model is a Llama of 110 M parameters.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from language_steps import MakeStep, Size, learning_step, llama, run

from adamerge_jax.task_vectors import Delta, DenseDelta, LowRankDelta

EXPERTS, RANK = 8, 16

SIZES = {
    "large": Size(llama(32000, 768, 2048, layers=12, heads=12), EXPERTS, sequences=2, length=128),
    "small": Size(llama(4000, 192, 512, layers=4, heads=6), EXPERTS, sequences=2, length=128),
}


def adapters(base: dict[str, jax.Array], *, built_out: bool = False) -> dict[str, Delta]:
    """Random factors for every matrix in the layers."""
    generator = np.random.default_rng(2)
    deltas: dict[str, Delta] = {}
    for name, array in base.items():
        if array.ndim != 3:
            continue
        layers, m, n = array.shape
        left = generator.standard_normal((layers, EXPERTS, m, RANK), np.float32) * 0.01
        right = generator.standard_normal((layers, EXPERTS, RANK, n), np.float32) * 0.02
        if built_out:
            deltas[name] = DenseDelta(jnp.asarray(left @ right))
        else:
            deltas[name] = LowRankDelta(jnp.asarray(left), jnp.asarray(right))
    return deltas


VARIANTS: dict[str, MakeStep] = {
    **{
        f"b: adapters, by {granularity} ({rematerialize})": partial(
            learning_step,
            make_deltas=adapters,
            granularity=granularity,
            rematerialize=rematerialize,
        )
        for granularity, rematerialize in (
            ("tensor", "elementwise"),
            ("row", "elementwise"),
            ("row", "layer"),
        )
    },
    "c: built out, by row (elementwise)": partial(
        learning_step,
        make_deltas=partial(adapters, built_out=True),
        granularity="row",
        rematerialize="elementwise",
    ),
}

if __name__ == "__main__":
    run(__doc__, __file__, SIZES, VARIANTS, lambda size: f"{EXPERTS} adapters of rank {RANK}")
