"""The model of the quickstart, a small vision transformer, and its training."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console
from rich.progress import track

from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.quickstart.digits import Images, Labels
from adamerge_jax.quickstart.tasks import pixels

if TYPE_CHECKING:
    from transformers import ViTConfig

Parameters = dict[str, Array]
Augment = Callable[[np.random.Generator, Images], Images]

_BATCH_SIZE = 64


def make_config() -> "ViTConfig":
    """Returns the config of the model: 4 layers of 64 features, for images of 8 x 8 pixels."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
        architectures=["ViTForImageClassification"],
    )


def initial_parameters(config: "ViTConfig", seed: int) -> Parameters:
    """Returns random weights by name, `*` where layers are stacked."""
    generator = np.random.default_rng([seed, 0])
    family = family_of(config)
    shapes = family.build_backbone(config).shapes | family.build_head(config).shapes
    parameters = {}
    for name, leaf in shapes.items():
        if name.endswith("bias"):
            array = np.zeros(leaf.shape)
        elif "layernorm" in name:
            array = np.ones(leaf.shape)
        elif "projection" in name:
            array = generator.standard_normal(leaf.shape) / config.patch_size
        elif is_stacked(name):
            array = generator.standard_normal(leaf.shape) * 0.6 / np.sqrt(leaf.shape[-1])
        else:
            array = generator.standard_normal(leaf.shape) * 0.02
        parameters[name] = jnp.asarray(array, jnp.float32)
    return parameters


def make_trainer(config: "ViTConfig", console: Console) -> Callable[..., Parameters]:
    """Returns a function that trains a model; the step is compiled once for all of them."""
    family = family_of(config)
    backbone = family.build_backbone(config, "nothing")
    head = family.build_head(config)
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.01)

    def loss(parameters: Parameters, images: Array, labels: Array) -> Array:
        of_head = {name: parameters[name] for name in head.shapes}
        of_backbone = {name: parameters[name] for name in backbone.shapes}
        logits = head(of_head, backbone(of_backbone, {"pixel_values": images}))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(parameters, state, images, labels, learning_rate):
        gradient = jax.grad(loss)(parameters, images, labels)
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    def train(
        parameters: Parameters,
        augment: Augment,
        images: Images,
        labels: Labels,
        steps: int,
        learning_rate: float,
        generator: np.random.Generator,
        description: str,
    ) -> Parameters:
        state = optimizer.init(parameters)
        schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
        rates = np.asarray(schedule(np.arange(steps)))
        for rate in track(rates, description=description, console=console):
            chosen = generator.integers(0, len(images), _BATCH_SIZE)
            batch = pixels(augment(generator, images[chosen]))
            parameters, state = step(parameters, state, batch, labels[chosen], rate)
        return parameters

    return train
