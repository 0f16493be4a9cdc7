"""Learning with LoRA adapters: `python experiments/benchmarks/adapters.py`.

On the same tokens, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of the base alone, nothing rematerialised: the gradient of the loss with
  respect to all its weights,
- (b) our learning step with 8 adapters of rank 16 on every matrix, which stay factors,
- (c) the same step with the same experts built out.

The model is a Llama of 100 M parameters.
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

from adamerge_jax.task_vectors import Delta, DenseDelta, LowRankDelta

RANK = 16

SIZES = {
    "large": Size(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            tie_word_embeddings=True,
        ),
        experts=8,
        sequences=2,
        length=128,
    ),
    "small": Size(
        LlamaConfig(
            vocab_size=4000,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            tie_word_embeddings=True,
        ),
        experts=8,
        sequences=2,
        length=128,
    ),
}


def plain_step(size: str) -> Callable[[], object]:
    """(a): the gradient of the mean loss with respect to all weights of the base."""
    return language_steps.plain_step(SIZES[size])


def adapters(
    base: dict[str, jax.Array], *, experts: int, built_out: bool = False
) -> dict[str, Delta]:
    """Random factors for every matrix in the layers."""
    generator = np.random.default_rng(2)
    deltas: dict[str, Delta] = {}
    for name, array in base.items():
        if array.ndim != 3:
            continue
        layers, m, n = array.shape
        left = generator.standard_normal((layers, experts, m, RANK), np.float32) * 0.01
        right = generator.standard_normal((layers, experts, RANK, n), np.float32) * 0.02
        if built_out:
            deltas[name] = DenseDelta(jnp.asarray(left @ right))
        else:
            deltas[name] = LowRankDelta(jnp.asarray(left), jnp.asarray(right))
    return deltas


def learning_step(
    size: str, *, granularity: str, rematerialize: str, built_out: bool = False
) -> Callable[[], object]:
    """(b) and (c): our learning step."""
    chosen = SIZES[size]
    return language_steps.learning_step(
        chosen,
        partial(adapters, experts=chosen.experts, built_out=built_out),
        granularity=granularity,
        rematerialize=rematerialize,
    )


VARIANTS: dict[str, timing.MakeStep] = {
    "a: plain forward+backward": plain_step,
    **{
        f"b: adapters, by {granularity} ({rematerialize})": partial(
            learning_step, granularity=granularity, rematerialize=rematerialize
        )
        for granularity, rematerialize in (
            ("tensor", "elementwise"),
            ("row", "elementwise"),
            ("row", "layer"),
        )
    },
    "c: built out, by row (elementwise)": partial(
        learning_step, granularity="row", rematerialize="elementwise", built_out=True
    ),
}


def title(size: str) -> str:
    """What a table is about."""
    chosen = SIZES[size]
    return (
        f"{size}: {chosen.parameters / 1e6:.1f} M parameters, {chosen.experts} adapters of rank "
        f"{RANK}, {chosen.tokens}"
    )


if __name__ == "__main__":
    timing.run(__doc__, __file__, VARIANTS, {size: title(size) for size in SIZES})
