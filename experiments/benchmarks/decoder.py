"""Learning with whole experts of a decoder: `python experiments/benchmarks/decoder.py`.

On the same tokens, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of the base alone, nothing rematerialised: the gradient of the loss with
  respect to all its weights,
- (b) our learning step with 4 whole experts.

The model is a Llama of 300 M parameters; with `--size small`, of 12 M.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import language_steps
import numpy as np
import timing
from language_steps import Size
from transformers import LlamaConfig

from adamerge_jax.names import is_stacked
from adamerge_jax.task_vectors import Delta, DenseDelta

SIZES = {
    "large": Size(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=22,
            num_attention_heads=16,
            num_key_value_heads=16,
            tie_word_embeddings=True,
        ),
        experts=4,
        sequences=4,
        length=128,
    ),
    "small": Size(
        LlamaConfig(
            vocab_size=8000,
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=8,
            num_attention_heads=5,
            num_key_value_heads=5,
            tie_word_embeddings=True,
        ),
        experts=4,
        sequences=4,
        length=128,
    ),
}


def plain_step(size: str) -> Callable[[], object]:
    """(a): the gradient of the mean loss with respect to all weights of the base."""
    return language_steps.plain_step(SIZES[size])


def whole_experts(base: dict[str, jax.Array], *, experts: int) -> dict[str, Delta]:
    """Random deltas of all parameters."""
    generator = np.random.default_rng(2)
    deltas: dict[str, Delta] = {}
    for name, array in base.items():
        split = int(is_stacked(name))
        shape = (*array.shape[:split], experts, *array.shape[split:])
        values = generator.standard_normal(shape, np.float32)
        deltas[name] = DenseDelta(jnp.asarray(np.multiply(values, 0.002, out=values)))
    return deltas


def learning_step(size: str, *, granularity: str, rematerialize: str) -> Callable[[], object]:
    """(b): our learning step."""
    chosen = SIZES[size]
    return language_steps.learning_step(
        chosen,
        partial(whole_experts, experts=chosen.experts),
        granularity=granularity,
        rematerialize=rematerialize,
    )


VARIANTS: dict[str, timing.MakeStep] = {
    "a: plain forward+backward": plain_step,
    **{
        f"b: whole experts, by {granularity} ({rematerialize})": partial(
            learning_step, granularity=granularity, rematerialize=rematerialize
        )
        for granularity, rematerialize in (
            ("tensor", "elementwise"),
            ("row", "elementwise"),
            ("tensor", "layer"),
        )
    },
}


def title(size: str) -> str:
    """What a table is about."""
    chosen = SIZES[size]
    gigabytes = 4 * chosen.experts * chosen.parameters / 1e9
    return (
        f"{size}: {chosen.parameters / 1e6:.1f} M parameters, {chosen.experts} experts (task "
        f"vectors {gigabytes:.2f} GB), {chosen.tokens}"
    )


if __name__ == "__main__":
    timing.run(__doc__, __file__, VARIANTS, {size: title(size) for size in SIZES})
