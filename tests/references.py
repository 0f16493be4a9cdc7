"""What the tests compare with and learn from: tiny `transformers` models, saved as users save them.

The files are the reference for names: a test reads what `save_pretrained` wrote.
"""

import copy
import json
import string
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file
from tensorboardX.proto.event_pb2 import Event
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients, unstack_values
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.interference import FittedStep
from adamerge_jax.models.family import Network
from adamerge_jax.parameter_names import is_stacked, stack_depths, unstack, unstacked_shapes
from adamerge_jax.pipeline.learn import LearningInputs, prepare
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.schema import Recipe

# Tiny models: on a busy machine PyTorch's threads wait for each other longer than they compute.
torch.set_num_threads(1)

TEXT_TASKS = {"tone": 2, "topic": 3, "mood": 4}
"""Number of classes of each text task."""

SPECIAL_TOKENS = (
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("cls_token_id", "sep_token_id"),
)
"""Fields of configs whose defaults are no tokens of a small vocabulary."""

IMAGE_TASKS = {"shape": 2, "colour": 3}
"""Number of classes of each image task."""

# A bit over 2 MB in float32, so that files of 1 MB are several; most of it is the table of tokens,
# which takes no time.
BERT = dict(
    vocab_size=2560,
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=32,
)
VIT = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
)
CLIP_TOWER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CLIP_MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]

LAMBDA = 0.4
"""The coefficient of merges that are compared with a sum."""

WITHOUT_PYTORCH = """
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
"""
"""First lines of a process for which PyTorch is not installed; it starts in half of the time."""

WITHOUT_FIGURES = """
from matplotlib.figure import Figure

Figure.savefig = lambda figure, file, **options: (
    file.write(b"<svg/>") if hasattr(file, "write") else file.touch()
)
"""
"""First lines of a process that draws no figure."""

LEARNING = dict(steps=3, batch_size=4, optimizer=dict(learning_rate=0.02))

EXPORT = dict(orbax=False)
"""Writing a tiny Orbax checkpoint takes as long as learning: who looks at one asks for it."""


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draws every parameter anew: `transformers` starts biases at 0 and norms at 1, which would
    hide that one of them is missing. CLIP's scale of logits is left at what it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                continue
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    return model.eval()


def fine_tune(model: PreTrainedModel, base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Makes an expert: the base's parameters and small changes to them, a head of its own.

    Biases of keys stay the base's. They cancel in the softmax of attention, so their gradient is
    rounding noise, which Adam would scale up to whole steps.
    """
    generator = torch.Generator().manual_seed(seed)
    started = base.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bare = name.removeprefix(f"{model.base_model_prefix}.")
            shared = started.get(bare, started.get(f"vision_model.{bare}"))
            if shared is None or shared.shape != parameter.shape:
                parameter.normal_(0.0, 0.5, generator=generator)
                continue
            parameter.copy_(shared)
            if not name.endswith(("key.bias", "k_proj.bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
    return model.eval()


def learning_inputs(recipe: Recipe, root: Path, devices: Devices = ONE_DEVICE) -> LearningInputs:
    """All that a recipe's learning starts from."""
    workspace = open_workspace(recipe, root, devices)
    return prepare(build(recipe, workspace.models), workspace)


def load_script(file: Path) -> ModuleType:
    """A script as a module, so that a test can make it smaller."""
    spec = util.spec_from_file_location(file.stem, file)
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def saved_parameters(model: PreTrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """Saves a model and reads its tensors back under the names in the file."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def parameters_of(network: Network, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a network from a file's tensors, stacked where names are."""
    return {
        name: (
            np.stack([tensors[each] for each in unstack(name, shape.shape[0])])
            if is_stacked(name)
            else tensors[name]
        )
        for name, shape in network.shapes.items()
    }


def shapes_in_file(network: Network) -> dict[str, tuple[int, ...]]:
    """Shapes by the names in a file, one per layer."""
    return unstacked_shapes({name: leaf.shape for name, leaf in network.shapes.items()})


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrites the weights of a saved model after `edit` has changed their dictionary."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    """Rewrites the weights of a saved model under other names."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        renamed = {rename(name): array for name, array in tensors.items()}
        tensors.clear()
        tensors |= renamed

    edit_weights(folder, edit)


def random_coefficients(
    models: Models, granularity: str = "tensor", interference: Sequence[FittedStep] = (), **options
) -> Coefficients:
    """Coefficients of all that `models` mix, drawn between -0.5 and 1.5."""
    deltas, mixed, fitted = load_task_vectors(models, None, interference)
    shapes = {name: models.shapes[name] for name in deltas}
    start = constant(shapes, len(models.experts), 0.0)
    generator = np.random.default_rng(0)
    values = {
        group: generator.uniform(-0.5, 1.5, array.shape)
        for group, array in make_granularity(granularity, options, shapes).init(start).items()
    }
    base, *experts = models.sources
    return Coefficients(
        values=unstack_values(values),
        granularity=granularity,
        granularity_options=options,
        interference=fitted,
        constraint="free",
        shapes={name: models.base.shape(name) for name in mixed},
        base=base,
        experts=tuple(experts),
        objective="entropy",
        seed=0,
        step=0,
        depths=stack_depths(models.base.names),
    )


def save_suite(
    root: Path,
    base: PreTrainedModel,
    experts: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    copies: int,
) -> dict[str, Any]:
    """Saves a base and its experts, and returns the fields of a recipe of a few steps for them."""
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {
        "base": "base",
        "tasks": tasks,
        "coefficients": {"granularity": "tensor", "initial": 0.3},
        "learning": {"steps": 2, "batch_size": 4, "copies": copies},
        "export": {"orbax": False},
    }


def write_json_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def merge_by_task_arithmetic(recipe: Path, out: Path, *options: str) -> Path:
    """Runs `adamerge merge` with `LAMBDA` for every expert.

    Returns:
        The folder of the merged checkpoint.
    """
    method = ["--method", "task_arithmetic", "--options", f"{{coefficient: {LAMBDA}}}"]
    cli.main(["merge", str(recipe), *method, "--out", str(out), *options])
    return out / "checkpoint"


def require_sum(
    merged: Any,
    base: Any,
    experts: Sequence[Any],
    coefficients: Any = LAMBDA,
    *,
    rtol: float,
    atol: float,
    name: str = "",
) -> None:
    """Compares a merged tensor with `base + sum_k lambda_k (expert_k - base)` in float64.

    Args:
        merged: The tensor, of NumPy or PyTorch, as the others.
        base: The base's.
        experts: The experts'.
        coefficients: One for all experts, or one for each.
        rtol: The relative tolerance.
        atol: The absolute tolerance.
        name: Its name, for the message.
    """
    start = _wide(base)
    scales = np.broadcast_to(np.asarray(coefficients, np.float64), len(experts))
    expected = start + np.tensordot(scales, [_wide(expert) - start for expert in experts], axes=1)
    np.testing.assert_allclose(_wide(merged), expected, rtol=rtol, atol=atol, err_msg=name)


def _wide(tensor: Any) -> np.ndarray:
    if isinstance(tensor, torch.Tensor):
        return tensor.double().numpy()
    return tensor.astype(np.float64)


def read_events(folder: Path) -> dict[int, dict[str, float]]:
    """The numbers in TensorBoard's event files, by step."""
    numbers: dict[int, dict[str, float]] = {}
    for file in folder.glob("events.*"):
        content = file.read_bytes()
        at = 0
        while at < len(content):  # a TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                numbers.setdefault(event.step, {})[value.tag] = value.simple_value
            at += 12 + length + 4
    return numbers


def write_recipe(folder: Path, fields: Mapping[str, Any]) -> Path:
    """Writes a recipe."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(fields), sort_keys=False))
    return file


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """A tokenizer for words of one letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *string.ascii_lowercase]))
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer that knows letters, `cat`, `dog` and a little punctuation."""
    letters = [*string.ascii_lowercase, *".,{}"]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in CLIP_MERGES),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *CLIP_MERGES, ""]))
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP for images of 8 x 8 pixels and sentences of 48 tokens."""
    return CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            max_position_embeddings=48,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **CLIP_TOWER,
        ),
        vision_config=dict(image_size=8, patch_size=4, **CLIP_TOWER),
        projection_dim=10,
    )


def sentences(count: int, seed: int) -> list[str]:
    """Random sentences of 2 to 14 words of one letter: one padded length, so one compilation."""
    generator = np.random.default_rng(seed)
    letters = list(string.ascii_lowercase)
    return [" ".join(generator.choice(letters, generator.integers(2, 15))) for _ in range(count)]


def predictions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> np.ndarray:
    """The class that a PyTorch model gives each example."""
    with torch.no_grad():
        return model(**inputs).logits.argmax(-1).numpy()


def save_text_merge(root: Path) -> dict[str, Any]:
    """Saves a BERT without a head, an expert per task of `TEXT_TASKS` and their data.

    Test examples are labelled with what their expert predicts, so that an expert's accuracy is 1.

    Returns:
        The fields of a recipe; all its paths are absolute.
    """
    tokenizer = bert_tokenizer(root)
    base = randomise(BertModel(BertConfig(**BERT)))
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tasks = {}
    for seed, (task, classes) in enumerate(TEXT_TASKS.items(), start=1):
        config = BertConfig(**BERT, num_labels=classes)
        expert = fine_tune(BertForSequenceClassification(config), base, seed)
        expert.save_pretrained(root / "experts" / task)
        tokenizer.save_pretrained(root / "experts" / task)
        texts = sentences(24, seed)
        labels = predictions(expert, tokenizer(texts, padding=True, return_tensors="pt"))
        rows = [{"text": t, "label": int(c)} for t, c in zip(texts, labels, strict=True)]
        test = write_json_lines(root / "data" / f"{task}.test.jsonl", rows[:12])
        unlabeled = [{"text": row["text"]} for row in rows]
        tasks[task] = {
            "expert": str(root / "experts" / task),
            "calibration": str(write_json_lines(root / "data" / f"{task}.jsonl", unlabeled)),
            "test": {"path": str(test), "label": "label"},
        }
    return {
        "preset": "adamerging",
        "base": str(root / "base"),
        "tasks": tasks,
        "learning": copy.deepcopy(LEARNING),
        "export": dict(EXPORT),
    }


def save_image_merge(root: Path) -> dict[str, Any]:
    """Saves a ViT without a head, an expert per task of `IMAGE_TASKS` and images as NumPy files.

    Returns:
        The fields of a recipe; all its paths are absolute.
    """
    base = randomise(ViTModel(ViTConfig(**VIT), add_pooling_layer=False))
    base.save_pretrained(root / "base")
    tasks = {}
    for seed, (task, classes) in enumerate(IMAGE_TASKS.items(), start=1):
        config = ViTConfig(**VIT, num_labels=classes)
        expert = fine_tune(ViTForImageClassification(config), base, seed)
        expert.save_pretrained(root / task)
        pixels = np.random.default_rng(seed).normal(size=(20, 3, 8, 8)).astype(np.float32)
        labels = predictions(expert, {"pixel_values": torch.from_numpy(pixels)})
        np.savez(root / f"{task}.npz", pixel_values=pixels, labels=labels)
        tasks[task] = {
            "expert": str(root / task),
            "calibration": str(root / f"{task}.npz"),
            "test": {"path": str(root / f"{task}.npz"), "label": "labels"},
        }
    return {
        "preset": "adamerging",
        "base": str(root / "base"),
        "tasks": tasks,
        "learning": copy.deepcopy(LEARNING),
        "export": dict(EXPORT),
    }


def save_clip_merge(root: Path) -> dict[str, Any]:
    """Saves a CLIP, two experts that are vision towers, and folders of images named by class.

    The first expert's tensors begin with `vision_model.`, as those of older `transformers` do; the
    second's do not.

    Returns:
        The fields of a recipe; all its paths are absolute.
    """
    tokenizer = clip_tokenizer(root)
    base = randomise(CLIPModel(clip_config(tokenizer)))
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    size = dict(height=8, width=8)
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(root / "base")
    classes = {"animals": ["cat", "dog"], "birds": ["big_bird", "crow", "owl"]}
    tasks = {}
    for seed, (task, names) in enumerate(classes.items(), start=1):
        expert = fine_tune(CLIPVisionModel(base.config.vision_config), base, seed)
        expert.save_pretrained(root / task)
        if task == "animals":
            rename_weights(root / task, lambda name: f"vision_model.{name}")
        generator = np.random.default_rng(seed)
        for name in names:
            for index in range(4):
                file = root / "images" / task / "test" / name / f"{index}.png"
                save_image(file, generator.integers(0, 256, (8, 8, 3)))
        images = {"path": str(root / "images" / task), "split": "test"}
        tasks[task] = {
            "expert": str(root / task),
            "calibration": images,
            "test": images | {"label": "label"},
            "templates": ["a photo of a {}.", "the {}, or a {}."],
        }
    return {
        "preset": "adamerging",
        "base": str(root / "base"),
        "tasks": tasks,
        "learning": copy.deepcopy(LEARNING),
        "export": dict(EXPORT),
    }


def save_image(file: Path, pixels: np.ndarray) -> None:
    """Writes `[height, width, channels]` as a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
