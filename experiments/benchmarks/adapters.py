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
import numpy as np
import optax
import timing
from transformers import LlamaConfig

from adamerge_jax.calibration import Batch
from adamerge_jax.coefficients import CONSTRAINTS
from adamerge_jax.granularities import constant, make_granularity
from adamerge_jax.learning import Frozen, forward_with_heads, make_learner
from adamerge_jax.models import family_of, head_parameters
from adamerge_jax.objectives import Targets, cross_entropy, token_losses
from adamerge_jax.task_vectors import DenseDelta, LowRankDelta

EXPERTS, RANK = 8, 16

CONFIGS = {
    "large": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    ),
    "small": LlamaConfig(
        vocab_size=4000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        tie_word_embeddings=True,
    ),
}
SEQUENCES, LENGTH = 2, 128
"""Of each task in a batch."""


def weights(size: str) -> dict[str, jax.Array]:
    """Random parameters of the base."""
    generator = np.random.default_rng(0)
    shapes = family_of(CONFIGS[size]).build_trunk(CONFIGS[size]).shapes
    return {
        name: jnp.ones(leaf.shape)
        if "norm" in name
        else jnp.asarray(0.02 * generator.standard_normal(leaf.shape, np.float32))
        for name, leaf in shapes.items()
    }


def tokens(size: str) -> np.ndarray:
    """One batch of sequences of all tasks."""
    shape = (EXPERTS * SEQUENCES, LENGTH)
    return np.random.default_rng(1).integers(0, CONFIGS[size].vocab_size, shape, np.int32)


def plain_step(size: str) -> Callable[[], object]:
    """(a): the gradient of the mean loss with respect to all weights of the base."""
    family = family_of(CONFIGS[size])
    trunk = family.build_trunk(CONFIGS[size], "nothing")
    head = family.build_head(CONFIGS[size])
    parameters, ids = weights(size), jnp.asarray(tokens(size))

    @jax.jit
    def step(parameters, ids):
        def loss(parameters):
            outputs = trunk(parameters, {"input_ids": ids})
            logits = head(head_parameters(head, {}, parameters), outputs)
            return token_losses(logits[:, :-1], ids[:, 1:]).mean()

        return jax.grad(loss)(parameters)

    return lambda: jax.block_until_ready(step(parameters, ids))


def learning_step(
    size: str, *, granularity: str, rematerialize: str, built_out: bool = False
) -> Callable[[], object]:
    """(b) and (c): our learning step."""
    family = family_of(CONFIGS[size])
    trunk = family.build_trunk(CONFIGS[size], rematerialize)
    head = family.build_head(CONFIGS[size])
    base, ids = weights(size), tokens(size)
    generator = np.random.default_rng(2)
    deltas = {}
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
    shapes = {name: base[name].shape for name in deltas}
    chosen = make_granularity(granularity, {}, shapes)
    learner = make_learner(
        forward_with_heads(trunk, [head] * EXPERTS, logits_again=True),
        chosen,
        CONSTRAINTS["free"],
        cross_entropy(),
        optax.adam(1e-3),
    )
    state = learner.init(chosen.init(constant(shapes, EXPERTS, 0.3)))
    labels = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100, np.int32)], axis=1)
    targets = [Targets(labels=own) for own in np.split(labels, EXPERTS)]
    batch = Batch(
        {"input_ids": ids}, np.full((EXPERTS, SEQUENCES), 1 / SEQUENCES, np.float32), targets
    )
    frozen = Frozen(base, deltas, [{}] * EXPERTS)
    return lambda: jax.block_until_ready(learner.step(state, frozen, batch))


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
    shapes = family_of(CONFIGS[size]).build_trunk(CONFIGS[size]).shapes
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    return (
        f"{size}: {parameters / 1e6:.1f} M parameters, {EXPERTS} adapters of rank {RANK}, "
        f"{EXPERTS * SEQUENCES} x {LENGTH} tokens"
    )


if __name__ == "__main__":
    timing.run(__doc__, __file__, VARIANTS, {size: title(size) for size in CONFIGS})
