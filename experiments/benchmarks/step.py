"""Time and memory of one learning step: `python experiments/benchmarks/step.py`.

On the same batch, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of one plain model in our code, nothing rematerialised,
- (b) our learning step, which mixes all experts into that model and learns one coefficient per
  tensor and expert,
- (c) the same step in PyTorch: merge the state dict once, visit the tasks one after the other,
  backward through everything.

Sizes: `small` is the quickstart's (4 experts, 16 images of each), `large` a CLIP ViT-B/32 vision
tower with 8 experts, 16 images of each. (c) needs PyTorch and transformers' models, which the
`test` extra installs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from transformers import CLIPConfig, PretrainedConfig, ViTConfig

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, tensor
from adamerge_jax.data.batches import Batch
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.learning.evaluation import evaluate_tasks
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.objectives import Targets, entropy
from adamerge_jax.task_vectors import DenseDelta

IMAGES_PER_TASK = 16
CLASSES = 10


def config_of(size: str) -> tuple[PretrainedConfig, int]:
    """The model of a size, and its number of experts."""
    if size == "large":
        vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        vision |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 32}
        return CLIPConfig(vision_config=vision, projection_dim=512, num_labels=CLASSES), 8
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 1}
    return ViTConfig(num_labels=CLASSES, **small), 4


def arrays(shapes: dict, generator: np.random.Generator, leading: tuple[int, ...] = ()) -> dict:
    """Random parameters, or deltas of `leading` experts, `[L, K, ...]` where stacked."""
    made = {}
    for name, leaf in shapes.items():
        split = 1 if "*" in name else 0
        shape = (*leaf.shape[:split], *leading, *leaf.shape[split:])
        made[name] = 0.02 * generator.standard_normal(shape, np.float32)
    return made


def pixels_of(config: PretrainedConfig, experts: int) -> np.ndarray:
    """One batch of images of all tasks."""
    vision = getattr(config, "vision_config", config)
    shape = (experts * IMAGES_PER_TASK, vision.num_channels, vision.image_size, vision.image_size)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def plain_step(size: str) -> Callable[[], object]:
    """(a): the gradient of the summed entropy with respect to all weights of one model."""
    config, experts = config_of(size)
    family = family_of(config)
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config)
    generator = np.random.default_rng(0)
    parameters = jax.device_put(arrays(backbone.shapes, generator))
    heads = jax.device_put([arrays(head.shapes, generator) for _ in range(experts)])
    forward = forward_with_heads(backbone, [head] * experts)
    weights = np.full((experts, IMAGES_PER_TASK), 1 / IMAGES_PER_TASK, np.float32)
    inputs = {"pixel_values": jnp.asarray(pixels_of(config, experts))}
    batch = Batch(inputs, weights, [Targets()] * experts)
    objectives = [entropy()] * experts

    @jax.jit
    def step(parameters, heads, inputs):
        def loss(parameters):
            outputs = forward(parameters, heads, inputs)
            return evaluate_tasks(
                objectives, outputs, batch._replace(inputs=inputs)
            ).objective.sum()

        return jax.grad(loss)(parameters)

    return lambda: jax.block_until_ready(step(parameters, heads, inputs))


def learning_step(
    size: str, rematerialize: str, devices: Devices = ONE_DEVICE
) -> Callable[[], object]:
    """(b): our learning step, one coefficient per tensor and expert."""
    config, experts = config_of(size)
    family = family_of(config)
    backbone, head = family.build_backbone(config, rematerialize), family.build_head(config)
    generator = np.random.default_rng(0)
    base = {
        name: devices.parameter(name, array)
        for name, array in arrays(backbone.shapes, generator).items()
    }
    heads = devices.replicate([arrays(head.shapes, generator) for _ in range(experts)])
    deltas = {
        name: devices.delta(name, DenseDelta(array))
        for name, array in arrays(backbone.shapes, generator, (experts,)).items()
    }
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    granularity = tensor(shapes)
    learner = make_learner(
        forward_with_heads(backbone, [head] * experts),
        granularity,
        CONSTRAINTS["clip"],
        entropy(),
        optax.adam(1e-3),
        devices=devices,
    )
    state = devices.replicate(learner.init(granularity.init(constant(shapes, experts, 0.3))))
    weights = np.full((experts, IMAGES_PER_TASK), 1 / IMAGES_PER_TASK, np.float32)
    pixels = {"pixel_values": pixels_of(config, experts)}
    batch = Batch(pixels, weights, [Targets()] * experts).spread(devices)
    frozen = Frozen(base, deltas, heads)
    return lambda: jax.block_until_ready(learner.step(state, frozen, batch))


def torch_step(size: str) -> Callable[[], object]:
    """(c): merge once, run every task, one backward, in PyTorch."""
    import torch
    from transformers import CLIPVisionModelWithProjection, ViTForImageClassification

    config, experts = config_of(size)
    if size == "large":
        config.vision_config.projection_dim = config.projection_dim
        model = CLIPVisionModelWithProjection(config.vision_config).eval()
        width = config.projection_dim
    else:
        model = ViTForImageClassification(config).vit.eval()
        width = config.hidden_size
    base = {name: leaf.detach() for name, leaf in model.named_parameters()}
    deltas = {name: 0.02 * torch.randn(experts, *leaf.shape) for name, leaf in base.items()}
    heads = [torch.randn(CLASSES, width) for _ in range(experts)]
    raw = {name: torch.full((experts,), 0.3, requires_grad=True) for name in base}
    optimizer = torch.optim.Adam(raw.values(), lr=1e-3)
    images = torch.from_numpy(pixels_of(config, experts)).split(IMAGES_PER_TASK)

    def step() -> None:
        merged = {
            name: leaf + torch.tensordot(raw[name].clamp(0, 1), deltas[name], dims=1)
            for name, leaf in base.items()
        }
        loss = 0.0
        for own, batch in zip(heads, images, strict=True):
            outputs = torch.func.functional_call(model, merged, (batch,))
            features = outputs.image_embeds if size == "large" else outputs.last_hidden_state[:, 0]
            logits = features @ own.T
            loss = loss - (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "a: plain forward+backward": plain_step,
    "b: learning step (elementwise)": partial(learning_step, rematerialize="elementwise"),
    "b: learning step (layer)": partial(learning_step, rematerialize="layer"),
    "c: PyTorch, merge once": torch_step,
}


def title(size: str) -> str:
    """What a table is about."""
    config, experts = config_of(size)
    shapes = family_of(config).build_backbone(config).shapes
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    return (
        f"{size}: {parameters / 1e6:.1f} M parameters, {experts} experts (task vectors "
        f"{experts * parameters * 4 / 1e9:.2f} GB), {experts * IMAGES_PER_TASK} images"
    )


if __name__ == "__main__":
    timing.run(__doc__, __file__, VARIANTS, {size: title(size) for size in ("small", "large")})
