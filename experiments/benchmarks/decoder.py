"""Learning with whole experts of a decoder: `python experiments/benchmarks/decoder.py`.

On the same tokens, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of the base alone, nothing rematerialised: the gradient of the loss with
  respect to all its weights,
- (b) our learning step with 4 whole experts.

The model is a Llama of 315 M parameters; with `--size small`, of 12 M.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from language_steps import MakeStep, Size, learning_step, llama, run

from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors import Delta, DenseDelta

EXPERTS = 4

SIZES = {
    "large": Size(llama(32000, 1024, 2816, layers=22, heads=16), EXPERTS, sequences=4, length=128),
    "small": Size(llama(8000, 320, 864, layers=8, heads=5), EXPERTS, sequences=4, length=128),
}


def whole_experts(base: dict[str, jax.Array]) -> dict[str, Delta]:
    """Random deltas of all parameters."""
    generator = np.random.default_rng(2)
    deltas: dict[str, Delta] = {}
    for name, array in base.items():
        split = int(is_stacked(name))
        shape = (*array.shape[:split], EXPERTS, *array.shape[split:])
        values = generator.standard_normal(shape, np.float32)
        deltas[name] = DenseDelta(jnp.asarray(np.multiply(values, 0.002, out=values)))
    return deltas


VARIANTS: dict[str, MakeStep] = {
    f"b: whole experts, by {granularity} ({rematerialize})": partial(
        learning_step,
        make_deltas=whole_experts,
        granularity=granularity,
        rematerialize=rematerialize,
    )
    for granularity, rematerialize in (
        ("tensor", "elementwise"),
        ("row", "elementwise"),
        ("tensor", "layer"),
    )
}


def in_words(size: Size) -> str:
    """What the experts are."""
    gigabytes = 4 * size.experts * size.parameters / 1e9
    return f"{size.experts} experts (task vectors {gigabytes:.2f} GB)"


if __name__ == "__main__":
    run(__doc__, __file__, SIZES, VARIANTS, in_words)
