"""Steps of language models on random weights and tokens, for the benchmarks that time them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from transformers import LlamaConfig

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.objectives import NOT_PREDICTED, Targets, cross_entropy, token_losses
from adamerge_jax.task_vectors import Delta

MakeStep = Callable[["Size"], Callable[[], object]]
"""From a size to a function that runs one step and waits for it."""


class Size(NamedTuple):
    """A model, its experts and a batch.

    Attributes:
        config: The model.
        experts: K.
        sequences: Of each task in a batch.
        length: Of a sequence, in tokens.
    """

    config: LlamaConfig
    experts: int
    sequences: int
    length: int

    @property
    def parameters(self) -> int:
        """Of the model."""
        shapes = family_of(self.config).build_backbone(self.config).shapes
        return sum(int(np.prod(leaf.shape)) for leaf in shapes.values())


def llama(vocabulary: int, width: int, middle: int, layers: int, heads: int) -> LlamaConfig:
    """A Llama with as many heads of keys as of queries, its output layer the embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
    )


def run(
    description: str,
    file: str,
    sizes: Mapping[str, Size],
    variants: Mapping[str, MakeStep],
    experts_in_words: Callable[[Size], str],
) -> None:
    """Measures the plain step and every variant, and prints a table for each size.

    Args:
        description: Of the command.
        file: The benchmark, see `timing.run`.
        sizes: By their names on the command line.
        variants: What is measured beside the plain step.
        experts_in_words: What the title of a table says of the experts.
    """

    def of_name(make: MakeStep) -> timing.MakeStep:
        return lambda name: make(sizes[name])

    steps = {"a: plain forward+backward": plain_step, **variants}
    titles = {
        name: f"{name}: {size.parameters / 1e6:.1f} M parameters, {experts_in_words(size)}, "
        f"{size.experts * size.sequences} x {size.length} tokens"
        for name, size in sizes.items()
    }
    timing.run(description, file, {name: of_name(make) for name, make in steps.items()}, titles)


def weights(size: Size) -> dict[str, jax.Array]:
    """Random parameters of the base."""
    generator = np.random.default_rng(0)
    return {
        name: jnp.ones(leaf.shape)
        if "norm" in name
        else jnp.asarray(0.02 * generator.standard_normal(leaf.shape, np.float32))
        for name, leaf in family_of(size.config).build_backbone(size.config).shapes.items()
    }


def tokens(size: Size) -> np.ndarray:
    """One batch of sequences of all tasks."""
    shape = (size.experts * size.sequences, size.length)
    return np.random.default_rng(1).integers(0, size.config.vocab_size, shape, np.int32)


def plain_step(size: Size) -> Callable[[], object]:
    """The gradient of the mean loss with respect to all weights of the base, nothing recomputed."""
    family = family_of(size.config)
    backbone, head = family.build_backbone(size.config, "nothing"), family.build_head(size.config)
    parameters, ids = weights(size), jnp.asarray(tokens(size))

    @jax.jit
    def step(parameters, ids):
        def loss(parameters):
            outputs = backbone(parameters, {"input_ids": ids})
            logits = head(complete_head(head, {}, parameters), outputs)
            return token_losses(logits[:, :-1], ids[:, 1:]).mean()

        return jax.grad(loss)(parameters)

    return lambda: jax.block_until_ready(step(parameters, ids))


def learning_step(
    size: Size,
    make_deltas: Callable[[dict[str, jax.Array]], dict[str, Delta]],
    *,
    granularity: str,
    rematerialize: str,
) -> Callable[[], object]:
    """Our learning step, with the experts that `make_deltas` makes for a base."""
    family = family_of(size.config)
    backbone, head = (
        family.build_backbone(size.config, rematerialize),
        family.build_head(size.config),
    )
    base, ids = weights(size), tokens(size)
    deltas = make_deltas(base)
    shapes = {name: base[name].shape for name in deltas}
    chosen = make_granularity(granularity, {}, shapes)
    learner = make_learner(
        forward_with_heads(backbone, [head] * size.experts, logits_again=True),
        chosen,
        CONSTRAINTS["free"],
        cross_entropy(),
        optax.adam(1e-3),
    )
    state = learner.init(chosen.init(constant(shapes, size.experts, 0.3)))
    end = np.full((len(ids), 1), NOT_PREDICTED, np.int32)
    labels = np.split(np.concatenate([ids[:, 1:], end], axis=1), size.experts)
    shares = np.full((size.experts, size.sequences), 1 / size.sequences, np.float32)
    batch = Batch({"input_ids": ids}, shares, [Targets(labels=own) for own in labels])
    frozen = Frozen(base, deltas, [{}] * size.experts)
    return lambda: jax.block_until_ready(learner.step(state, frozen, batch))
