"""The whole path on real data, without a network: `python experiments/quickstart.py`.

Trains a small vision transformer and four experts on scikit-learn's handwritten digits, saves them
as ordinary Hugging Face checkpoints, and merges them with the recipe that it writes beside them:

- `upright`: the digits as they are,
- `rotated`: turned by 180 degrees,
- `inverted`: dark on light instead of light on dark,
- `faint`: at a quarter of the contrast.

What helps with one of them hurts with another, so that adding up the experts is not enough.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ViTConfig

from adamerge_jax.checkpoints.folders import require_new
from adamerge_jax.checkpoints.huggingface_export import save_model
from adamerge_jax.cli.console import make_console
from adamerge_jax.cli.main import main as adamerge
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import is_stacked

Images = Float[np.ndarray, "N height width"]
Parameters = dict[str, Array]

TASKS: Mapping[str, Callable[[Images], Images]] = {
    "upright": lambda images: images,
    "rotated": lambda images: images[:, ::-1, ::-1],
    "inverted": lambda images: 1 - images,
    "faint": lambda images: images / 4,
}
"""What each task does to images with values from 0 to 1."""

CONFIG = ViTConfig(
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

BATCH_SIZE = 64
BASE_STEPS, BASE_LEARNING_RATE = 1500, 2e-3
EXPERT_STEPS, EXPERT_LEARNING_RATE = 500, 1e-3


def main() -> None:
    """Prepares checkpoints, data and recipe, then runs `adamerge learn` on the recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of all training")
    arguments = parser.parse_args()
    try:
        require_new(arguments.out)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    prepare(arguments.out, arguments.seed, make_console())
    recipe = arguments.out / "recipe.yaml"
    adamerge(["learn", str(recipe), "--out", str(arguments.out / "run")])


def prepare(folder: Path, seed: int, console: Console) -> None:
    """Writes `base/`, `experts/<task>/`, `data/<task>.<part>.npz` and `recipe.yaml`."""
    digits = load_digits()
    parts = split(digits.images.astype(np.float32) / 16, digits.target.astype(np.int32), seed)
    train_images, train_labels = parts.pop("train")
    train = make_trainer()
    base = train(
        initial_parameters(seed),
        lambda generator, images: reorient(generator, shift(generator, images)),
        train_images,
        train_labels,
        BASE_STEPS,
        BASE_LEARNING_RATE,
        np.random.default_rng([seed, 1]),
        "training the base",
    )
    save_model(folder / "base", CONFIG, base)
    (folder / "data").mkdir()
    for number, (task, transform) in enumerate(TASKS.items()):
        expert = train(
            base,
            lambda generator, images, transform=transform: transform(shift(generator, images)),
            train_images,
            train_labels,
            EXPERT_STEPS,
            EXPERT_LEARNING_RATE,
            np.random.default_rng([seed, 2, number]),
            f"training {task}",
        )
        save_model(folder / "experts" / task, CONFIG, expert)
        for part, (images, labels) in parts.items():
            np.savez(
                folder / "data" / f"{task}.{part}.npz",
                pixel_values=pixels(transform(images)),
                **{} if part == "calibration" else {"label": labels},
            )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(seed), sort_keys=False))
    console.print(f"base, experts, data and recipe.yaml are in {folder}/")


def recipe(seed: int) -> dict:
    """The recipe of the merge."""
    return {
        "name": "quickstart",
        "base": "base",
        "tasks": {
            task: {
                "expert": f"experts/{task}",
                "calibration": f"data/{task}.calibration.npz",
                "validation": {"path": f"data/{task}.validation.npz", "label": "label"},
                "test": {"path": f"data/{task}.test.npz", "label": "label"},
            }
            for task in TASKS
        },
        "seed": seed,
    }


def split(
    images: Images, labels: Int[np.ndarray, " N"], seed: int
) -> dict[str, tuple[Images, Int[np.ndarray, " N"]]]:
    """Disjoint parts: half to train on, 250 to calibrate, 250 to validate, the rest to test."""
    parts = {}
    rest = np.arange(len(images))
    for part, size in {"train": 897, "calibration": 250, "validation": 250}.items():
        chosen, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=seed
        )
        parts[part] = images[chosen], labels[chosen]
    parts["test"] = images[rest], labels[rest]
    return parts


def shift(generator: np.random.Generator, images: Images) -> Images:
    """Moves each image by up to one pixel."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2))
    offsets = generator.integers(0, 3, (2, len(images)))
    return windows[np.arange(len(images)), *offsets]


def reorient(generator: np.random.Generator, images: Images) -> Images:
    """Turns and mirrors each image into a random one of its eight orientations."""
    chosen = generator.random((3, len(images), 1, 1)) < 0.5
    images = np.where(chosen[0], images[:, :, ::-1], images)
    images = np.where(chosen[1], images[:, ::-1, :], images)
    return np.where(chosen[2], images.swapaxes(1, 2), images)


def pixels(images: Images) -> Float[np.ndarray, "N 1 height width"]:
    """What the model reads: values from -1 to 1, one channel."""
    return np.ascontiguousarray(2 * images[:, None] - 1)


def initial_parameters(seed: int) -> Parameters:
    """Random weights by name, `*` where layers are stacked."""
    generator = np.random.default_rng([seed, 0])
    family = family_of(CONFIG)
    shapes = family.build_backbone(CONFIG).shapes | family.build_head(CONFIG).shapes
    parameters = {}
    for name, leaf in shapes.items():
        if name.endswith("bias"):
            array = np.zeros(leaf.shape)
        elif "layernorm" in name:
            array = np.ones(leaf.shape)
        elif "projection" in name:
            array = generator.standard_normal(leaf.shape) / CONFIG.patch_size
        elif is_stacked(name):
            array = generator.standard_normal(leaf.shape) * 0.6 / np.sqrt(leaf.shape[-1])
        else:
            array = generator.standard_normal(leaf.shape) * 0.02
        parameters[name] = jnp.asarray(array, jnp.float32)
    return parameters


def make_trainer() -> Callable[..., Parameters]:
    """A function that trains a model; the step is compiled once for all of them."""
    family = family_of(CONFIG)
    backbone = family.build_backbone(CONFIG, "nothing")
    head = family.build_head(CONFIG)
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.01)

    def loss(parameters: Parameters, images: Array, labels: Array) -> Array:
        own = {name: parameters[name] for name in head.shapes}
        shared = {name: parameters[name] for name in backbone.shapes}
        logits = head(own, backbone(shared, {"pixel_values": images}))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(parameters, state, images, labels, learning_rate):
        gradient = jax.grad(loss)(parameters, images, labels)
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    def train(
        parameters: Parameters,
        augment: Callable[[np.random.Generator, Images], Images],
        images: Images,
        labels: Int[np.ndarray, " N"],
        steps: int,
        learning_rate: float,
        generator: np.random.Generator,
        description: str,
    ) -> Parameters:
        state = optimizer.init(parameters)
        schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
        rates = np.asarray(schedule(np.arange(steps)))
        for rate in track(rates, description=description):
            chosen = generator.integers(0, len(images), BATCH_SIZE)
            batch = pixels(augment(generator, images[chosen]))
            parameters, state = step(parameters, state, batch, labels[chosen], rate)
        return parameters

    return train


if __name__ == "__main__":
    main()
