"""Time and memory of one learning step: `python experiments/benchmarks/step.py`.

On the same batch, each in a process of its own, so that the peak memory is its own:

- (a) forward and backward of one plain model in our code, nothing rematerialised,
- (b) our learning step, which mixes all experts into that model and learns one coefficient per
  tensor and expert,
- (c) the same step in PyTorch: merge the state dict once, visit the tasks one after the other,
  backward through everything.

Sizes: `small` is the quickstart's (4 experts, 16 images of each), `large` a CLIP ViT-B/32 vision
tower with 8 experts, 16 images of each, `texts` a BERT of MiniLM's size with 6 experts, 16 texts of
each, as long as those of six data sets of sentences. A row of `texts` is a round of 16 steps, whose
batches are put together as `adamerge learn` does it: (a) and (b) run texts behind each other in
rows. (c) has batches of texts of like length, of which it pads each task to its longest. (c) needs
PyTorch and transformers' models, which the `test` extra installs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
import optax
import timing
from transformers import BertConfig, CLIPConfig, PretrainedConfig, ViTConfig

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, tensor
from adamerge_jax.data.batches import BATCHES_SORTED_TOGETHER, Batch, calibrate
from adamerge_jax.data.conversations import Tokens
from adamerge_jax.data.decoder_examples import DecoderExamples
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.learning.evaluation import evaluate_tasks
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.objectives import Targets, entropy
from adamerge_jax.task_vectors import DenseDelta

EXAMPLES_PER_TASK = 16
CLASSES = 10

TOKENS_OF_TASKS = (
    (3.05, 0.49),
    (1.57, 0.42),
    (3.14, 0.52),
    (3.09, 0.54),
    (3.33, 0.39),
    (2.55, 0.32),
)
"""Mean and standard deviation of the logarithm of a text's tokens, of each task."""


def random_texts(
    number: int, vocabulary: int, mean: float, deviation: float, seed: int
) -> DecoderExamples:
    """Returns texts of random tokens, 3 to 128 of them."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(mean, deviation, number)).round().astype(int).clip(3, 128)
    ids = [generator.integers(1, vocabulary, length).tolist() for length in lengths]
    return DecoderExamples([Tokens(row, [False] * len(row)) for row in ids], 0, 128)


def config_of(size: str) -> tuple[PretrainedConfig, int]:
    """Returns the model of a size, and its number of experts."""
    if size == "texts":
        minilm = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        return BertConfig(num_labels=CLASSES, **minilm), len(TOKENS_OF_TASKS)
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


def batches_of(size: str, *, packed: bool) -> list[Batch]:
    """Returns the batches of a round: one of images; of texts several, packed or sorted."""
    config, experts = config_of(size)
    if size == "texts":
        number = BATCHES_SORTED_TOGETHER * EXAMPLES_PER_TASK
        texts = {
            f"task {seed}": random_texts(number + 1, config.vocab_size, *tokens, seed)
            for seed, tokens in enumerate(TOKENS_OF_TASKS)
        }
        calibration = calibrate(texts, batch_size=EXAMPLES_PER_TASK, held_out=0.001, seed=0)
        if packed:
            calibration = calibration.packed()
        drawn = list(islice(calibration.batches(), BATCHES_SORTED_TOGETHER))
        return [batch._replace(targets=[Targets()] * experts) for batch in drawn]
    vision = getattr(config, "vision_config", config)
    shape = (experts * EXAMPLES_PER_TASK, vision.num_channels, vision.image_size, vision.image_size)
    pixels = np.random.default_rng(1).standard_normal(shape, np.float32)
    weights = np.full((experts, EXAMPLES_PER_TASK), 1 / EXAMPLES_PER_TASK, np.float32)
    return [Batch({"pixel_values": pixels}, weights, [Targets()] * experts)]


def a_round(step: Callable[[Batch], object], batches: Sequence[Batch]) -> Callable[[], object]:
    """Returns a function that runs a step on each batch, and waits for the last one."""

    def run() -> object:
        for batch in batches:
            result = step(batch)
        return jax.block_until_ready(result)

    return run


def plain_step(size: str) -> Callable[[], object]:
    """(a): the gradient of the summed entropy with respect to all weights of one model."""
    config, experts = config_of(size)
    family = family_of(config)
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config)
    generator = np.random.default_rng(0)
    parameters = jax.device_put(arrays(backbone.shapes, generator))
    heads = jax.device_put([arrays(head.shapes, generator) for _ in range(experts)])
    forward = forward_with_heads(backbone, [head] * experts)
    objectives = [entropy()] * experts

    @jax.jit
    def step(parameters, heads, batch):
        def loss(parameters):
            outputs = forward(parameters, heads, batch.inputs)
            return evaluate_tasks(objectives, outputs, batch).objective.sum()

        return jax.grad(loss)(parameters)

    return a_round(partial(step, parameters, heads), jax.device_put(batches_of(size, packed=True)))


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
    frozen = Frozen(base, deltas, heads)
    batches = [batch.spread(devices) for batch in batches_of(size, packed=devices.mesh is None)]
    return a_round(lambda batch: learner.step(state, frozen, batch), batches)


def torch_step(size: str) -> Callable[[], object]:
    """(c): merge once, run every task, one backward, in PyTorch."""
    import torch
    from transformers import BertModel, CLIPVisionModelWithProjection, ViTForImageClassification

    config, experts = config_of(size)
    if size == "texts":
        model = BertModel(config).eval()
        width = config.hidden_size
    elif size == "large":
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
    batches = [_inputs_by_task(batch, experts) for batch in batches_of(size, packed=False)]

    def step(inputs: list[dict[str, torch.Tensor]]) -> None:
        merged = {
            name: leaf + torch.tensordot(raw[name].clamp(0, 1), deltas[name], dims=1)
            for name, leaf in base.items()
        }
        loss = 0.0
        for head, given in zip(heads, inputs, strict=True):
            outputs = torch.func.functional_call(model, merged, (), given)
            if size == "texts":
                features = outputs.pooler_output
            else:
                is_clip = size == "large"
                features = outputs.image_embeds if is_clip else outputs.last_hidden_state[:, 0]
            logits = features @ head.T
            loss = loss - (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return a_round(step, batches)


def _inputs_by_task(batch: Batch, experts: int) -> list[dict[str, Any]]:
    """Returns the inputs of each task as PyTorch's tensors, texts cut at the task's longest."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    tasks = [
        {name: tensor.chunk(experts)[task] for name, tensor in tensors.items()}
        for task in range(experts)
    ]
    for inputs in tasks:
        if "attention_mask" in inputs:
            longest = int(inputs["attention_mask"].sum(1).max())
            inputs.update({name: tensor[:, :longest] for name, tensor in inputs.items()})
    return tasks


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "a: plain forward+backward": plain_step,
    "b: learning step (elementwise)": partial(learning_step, rematerialize="elementwise"),
    "b: learning step (layer)": partial(learning_step, rematerialize="layer"),
    "c: PyTorch, merge once": torch_step,
}


def title(size: str) -> str:
    """Returns what a table is about."""
    config, experts = config_of(size)
    examples = EXAMPLES_PER_TASK * experts
    data = (
        f"{BATCHES_SORTED_TOGETHER} x {examples} texts" if size == "texts" else f"{examples} images"
    )
    shapes = family_of(config).build_backbone(config).shapes
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    return (
        f"{size}: {parameters / 1e6:.1f} M parameters, {experts} experts (task vectors "
        f"{experts * parameters * 4 / 1e9:.2f} GB), {data}"
    )


if __name__ == "__main__":
    sizes = ("small", "large", "texts")
    timing.run(__doc__, __file__, VARIANTS, {size: title(size) for size in sizes})
