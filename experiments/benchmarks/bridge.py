"""A bridged model beside our own family: `python experiments/benchmarks/bridge.py`.

The same learning step of the same BERT, each in a process of its own, so that the peak memory is
its own:

- (a) by our own family, whose layers are stacked and scanned,
- (b) by the model's own PyTorch forward, run as JAX.

Size `minilm` is that of MiniLM (6 layers, hidden size 384), with 3 experts and 8 texts of 32 tokens
of each. (b) needs the `torch` extra.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from transformers import BertConfig

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, tensor
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.objectives import Targets, entropy
from adamerge_jax.task_vectors import DenseDelta

EXPERTS, TEXTS, TOKENS = 3, 8, 32

CONFIGS = {
    "minilm": BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=6,
    ),
    "tiny": BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    ),
}


def learning_step(size: str, bridged: bool, rematerialize: str) -> Callable[[], object]:
    """One step that learns a coefficient per tensor and expert."""
    config = CONFIGS[size]
    architecture = "BertForSequenceClassification"
    family = bridged_family(config, architecture) if bridged else family_of(config)
    backbone, head = family.build_backbone(config, rematerialize), family.build_head(config)
    generator = np.random.default_rng(0)

    def draw(shapes: dict, experts: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        drawn = {}
        for name, leaf in shapes.items():
            split = 1 if "*" in name else 0
            shape = (*leaf.shape[:split], *experts, *leaf.shape[split:])
            drawn[name] = 0.02 * generator.standard_normal(shape, np.float32)
        return drawn

    base = jax.device_put(draw(backbone.shapes))
    deltas = {
        name: DenseDelta(jnp.asarray(array))
        for name, array in draw(backbone.shapes, (EXPERTS,)).items()
    }
    heads = jax.device_put([draw(head.shapes) for _ in range(EXPERTS)])
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    granularity = tensor(shapes)
    learner = make_learner(
        forward_with_heads(backbone, [head] * EXPERTS),
        granularity,
        CONSTRAINTS["clip"],
        entropy(),
        optax.adam(1e-3),
    )
    state = learner.init(granularity.init(constant(shapes, EXPERTS, 0.3)))
    token_ids = generator.integers(0, config.vocab_size, (EXPERTS * TEXTS, TOKENS), np.int32)
    inputs = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
    weights = np.full((EXPERTS, TEXTS), 1 / TEXTS, np.float32)
    batch = Batch(jax.device_put(inputs), weights, [Targets()] * EXPERTS)
    frozen = Frozen(base, deltas, heads)
    return lambda: jax.block_until_ready(learner.step(state, frozen, batch))


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "a: own family": partial(learning_step, bridged=False, rematerialize="elementwise"),
    "b: PyTorch forward": partial(learning_step, bridged=True, rematerialize="elementwise"),
    "b: PyTorch forward (layer)": partial(learning_step, bridged=True, rematerialize="layer"),
}


if __name__ == "__main__":
    titles = {
        size: f"{size}: BERT of {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{EXPERTS} experts, {EXPERTS * TEXTS} texts of {TOKENS} tokens"
        for size, config in CONFIGS.items()
    }
    timing.run(__doc__, __file__, VARIANTS, titles)
