"""Each preset against its paper's update as a plain PyTorch loop, and how presets fill recipes."""

import copy
import math
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.importance import importance_pieces
from adamerge_jax.data.batches import Batch, Calibration
from adamerge_jax.errors import InputError
from adamerge_jax.models.token_rows import PLACES, SLOTS
from adamerge_jax.pipeline.learn import LearningInputs, learn_coefficients
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS, apply_preset
from adamerge_jax.recipes.schema import Recipe
from tests.references import learning_inputs

STEPS = 8
BATCH_SIZE = 4

LONG_STEPS = (
    "atlas",
    "atlas-k",
    "expert-merging",
    "expert-merging++",
    "recommended",
    "self-positioning",
    "symerge",
)
"""Presets that are compared at a tenth of their learning rate. Adam takes whole steps however small
a gradient is, so that at these presets' own rates ten steps turn float32's rounding into up to 2e-4
of the coefficients that have the smallest gradients; at a tenth it stays under 1e-5. Among the
10,000 rows of `recommended` some have hardly any gradient at all: it gets a larger epsilon too."""

Tensors = dict[str, torch.Tensor]


class Reference(NamedTuple):
    """What a PyTorch user has: the models, and tensors by their names in the experts' files."""

    experts: list[PreTrainedModel]
    names: dict[str, str]  # of a module's parameter in the file
    base: Tensors
    deltas: Tensors  # [K, *shape]


def load_reference(recipe: Recipe) -> Reference:
    """Loads the models and subtracts; what the recipe keeps from the base is left out.

    All in float64, so that rounding is the package's alone.
    """
    folders = [task.expert.path for task in recipe.tasks.values()]
    experts = [
        AutoModelForSequenceClassification.from_pretrained(folder).eval().requires_grad_(False)
        for folder in folders
    ]
    files = [load_file(f"{folder}/model.safetensors") for folder in folders]
    by_value = {array.tobytes(): name for name, array in files[0].items()}
    names = {n: by_value[p.numpy().tobytes()] for n, p in experts[0].named_parameters()}
    experts = [expert.double() for expert in experts]
    own = load_file(f"{recipe.base.path}/model.safetensors")
    base = {f"bert.{name}": torch.from_numpy(array).double() for name, array in own.items()}
    deltas = {}
    for name, start in base.items():
        if any(fnmatchcase(name, pattern) for pattern in recipe.keep_from_base):
            continue
        # The package subtracts in float32.
        delta = torch.stack([torch.from_numpy(file[name]) - start.float() for file in files])
        if delta.any():
            deltas[name] = delta.double()
    return Reference(experts, names, base, deltas)


def ties(deltas: Tensors, density: float) -> Tensors:
    """TIES's trim and elect sign, as published: over each expert's whole flattened model."""
    flat = torch.cat([delta.flatten(1) for delta in deltas.values()], dim=1)
    kept = int(flat.shape[1] * density)
    # The authors keep one entry more: their threshold is the largest of those to be dropped.
    threshold = flat.abs().kthvalue(flat.shape[1] - kept, dim=1, keepdim=True).values
    flat = torch.where(flat.abs() >= threshold, flat, 0)
    flat = torch.where(flat.sign() == flat.sum(0).sign(), flat, 0)
    pieces = flat.split([delta[0].numel() for delta in deltas.values()], dim=1)
    return {
        name: piece.reshape(deltas[name].shape) for name, piece in zip(deltas, pieces, strict=True)
    }


class Sharing(NamedTuple):
    """Which entries of a tensor share a coefficient.

    Attributes:
        group: Name of the array of coefficients.
        index: Which of its coefficients each entry has, of the tensor's shape, or None where the
            group has one for each expert.
        directions: The singular directions of each expert's change, `[K, r, *shape]`, where these
            have a coefficient each, or None.
    """

    group: str
    index: torch.Tensor | None = None
    directions: torch.Tensor | None = None


def share(granularity: str, options: dict[str, Any], deltas: Tensors) -> dict[str, Sharing]:
    """The granularities of the presets, entry by entry."""
    sharing = {}
    for name, delta in deltas.items():
        shape = delta.shape[1:]
        size = shape.numel()
        matrix = len(shape) == 2 and "embed" not in name
        sharing[name] = Sharing("all" if granularity == "task" else name)
        if granularity == "row" and matrix:
            index = torch.arange(shape[0])[:, None].expand(shape)
            sharing[name] = Sharing(name, index)
        elif granularity == "partition" and matrix:
            seed, groups = options.get("seed", 0), options["groups"]
            order = np.random.default_rng([seed, size]).permutation(size)
            index = np.empty(size, int)
            index[order] = np.arange(size) // math.ceil(size / groups)
            sharing[name] = Sharing(name, torch.from_numpy(index).reshape(shape))
        elif granularity == "chunk" and options["pieces"].get(name, 1) > 1:
            index = torch.arange(size) // math.ceil(size / options["pieces"][name])
            sharing[name] = Sharing(name, index.reshape(shape))
        elif granularity == "singular" and matrix:
            assert not options
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            sharing[name] = Sharing(name, directions=torch.einsum("kmr,kr,krn->krmn", u, s, v))
        elif granularity not in ("task", "tensor", "row", "partition", "chunk", "singular"):
            raise NotImplementedError(granularity)
    return sharing


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of a step, by the formula of its schedule."""
    optimizer = recipe.learning.optimizer
    options = dict(optimizer.schedule_options)
    if optimizer.schedule is None:
        return optimizer.learning_rate
    if optimizer.schedule == "harmonic":
        return optimizer.learning_rate * 2 / (step + 2)
    if optimizer.schedule == "cosine_decay_schedule":
        assert not options
        return optimizer.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    assert optimizer.schedule == "cosine_warm_restarts"
    length, ratio = options["first_steps"], options["end_ratio"]
    while step >= length:
        step, length = step - length, length * options["factor"]
    decay = 0.5 * (1 + math.cos(math.pi * step / length))
    return optimizer.learning_rate * (ratio + (1 - ratio) * decay)


def soft_cross_entropies(merged, expert, temperature: float) -> torch.Tensor:
    soft = (expert.logits / temperature).softmax(-1)
    losses = torch.nn.functional.cross_entropy(merged.logits / temperature, soft, reduction="none")
    return temperature**2 * losses


def unsureness(expert) -> torch.Tensor:
    """0 where one class has all the probability, 1 where all have as much."""
    entropy = torch.distributions.Categorical(logits=expert.logits).entropy()
    return entropy / math.log(expert.logits.shape[-1])


def loss_of(
    recipe: Recipe, model, expert, inputs: Tensors, labels: torch.Tensor | None, cross_task
):
    """A task's part of the loss: its terms, weighted, as their papers write them.

    `cross_task` holds the logits of the merged model and of the expert on other tasks' examples.
    """
    total = 0.0
    for term in recipe.objectives:
        options = dict(term.options)
        assert not isinstance(term.weight, dict)
        if term.name == "entropy":
            loss = torch.distributions.Categorical(logits=model.logits).entropy().mean()
        elif term.name == "expert_labels":
            sure, label = expert.logits.softmax(-1).max(-1)
            own_sure, own_label = model.logits.softmax(-1).max(-1)
            counts = (label == own_label) | (sure >= own_sure)
            loss = torch.nn.functional.cross_entropy(model.logits[counts], label[counts])
        elif term.name == "cross_entropy":
            loss = torch.nn.functional.cross_entropy(model.logits, labels.long())
        elif term.name == "logit_alignment":
            temperature = options.pop("temperature", 1.0)
            assert options.pop("form", "soft") in ("soft", "kl")  # the same gradient
            options.pop("prompts", None)  # classifiers have none
            loss = soft_cross_entropies(model, expert, temperature).mean()
            others = unsureness(cross_task[1]) * soft_cross_entropies(*cross_task, temperature)
            loss = loss + options.pop("cross_task", 0.0) * others.mean()
        elif term.name == "hidden_state_alignment":
            relative = options.pop("relative", False)
            mask = inputs["attention_mask"]
            layers = options.pop("layers")
            loss = 0.0
            for layer in layers:
                wanted = expert.hidden_states[layer]
                error = ((model.hidden_states[layer] - wanted) ** 2).mean(-1)
                error = (error * mask).sum(1) / mask.sum(1)
                if relative:
                    size = ((wanted**2).mean(-1) * mask).sum(1) / mask.sum(1)
                    error = error / size.mean()
                loss = loss + error.mean() / len(layers)
        else:
            raise NotImplementedError(term.name)
        assert not options, options
        total = total + term.weight * loss
    return total


def pytorch_loop(
    recipe: Recipe,
    reference: Reference,
    calibration: Calibration,
    sharing: dict[str, Sharing],
    start: Tensors,
    steps: int = STEPS,
) -> dict[str, np.ndarray]:
    """Learns coefficients `[K, ...]` by group: one merged state dict per step, task after task."""
    invert, constrain = LEARNED[recipe.coefficients.constraint]
    raw = {group: invert(values.double()) for group, values in start.items()}
    leaves = [leaf.requires_grad_() for learned in raw.values() for leaf in learned]
    start = {group: constrain(*learned).detach() for group, learned in raw.items()}
    settings = recipe.learning.optimizer
    assert set(settings.options) <= {"weight_decay", "eps"}
    optimizer = OPTIMIZERS[settings.name](leaves, **settings.options)
    for step, batch in enumerate(islice(calibration.batches(), steps)):
        coefficients = {group: constrain(*learned) for group, learned in raw.items()}
        merged = dict(reference.base)
        for name, (group, index, directions) in sharing.items():
            values = coefficients[group]
            if directions is not None:
                change = torch.einsum("kr,krmn->mn", values, directions)
                merged[name] = reference.base[name] + change
                continue
            if index is None:
                values = values.reshape(-1, *(1 for _ in reference.base[name].shape))
            else:
                values = values.index_select(1, index.flatten()).reshape(-1, *index.shape)
            merged[name] = reference.base[name] + (values * reference.deltas[name]).sum(0)
        loss = sum(losses(recipe, reference, merged, batch))
        for term in recipe.regularizers:
            assert term.name == "distance", term.name
            p = term.options.get("p", 1)
            # Mean over groups of the sum over experts.
            away = [
                ((values - start[group]).abs() ** p).sum(0).flatten()
                for group, values in coefficients.items()
            ]
            loss = loss + term.weight * torch.cat(away).mean()
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            # `clip_grad_norm_` but for the 1e-6 that it adds to the norm.
            norm = torch.cat([leaf.grad.flatten() for leaf in leaves]).norm()
            for leaf in leaves:
                leaf.grad *= min(1.0, settings.clip_norm / norm.item())
        optimizer.param_groups[0]["lr"] = rate(recipe, step, steps)
        optimizer.step()
    return {group: constrain(*learned).detach().numpy() for group, learned in raw.items()}


def position_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A position between base and experts, the base's share 1/(K+1), and the scale to it."""
    scale = values.sum(0, keepdim=True) * (len(values) + 1) / len(values)
    return torch.cat([scale / (len(values) + 1), values]).div(scale).log(), scale


def mask_of(values: torch.Tensor) -> list[torch.Tensor]:
    """AdaRank's number for each expert, and the logits of its mask where there are parts."""
    if values.ndim == 1:
        return [values.clone()]
    return [values[:, 0].clone(), torch.full_like(values, 0.1)]


def masked(scale: torch.Tensor, logits: torch.Tensor | None = None) -> torch.Tensor:
    """The authors' straight-through mask, at their temperature of 10."""
    if logits is None:
        return scale
    soft = (logits / 10).sigmoid()
    return scale[:, None] * (soft + ((soft > 0.5).double() - soft).detach())


class FrankWolfe(torch.optim.Optimizer):
    """A part of the way to the expert, or to the base, along which the loss falls fastest."""

    def __init__(self, leaves: list[torch.Tensor]):
        super().__init__(leaves, {"lr": 1.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for values in group["params"]:
                vertex = torch.zeros_like(values)
                if values.grad.min() < 0:
                    vertex[values.grad.argmin()] = 1
                values += group["lr"] * (vertex - values)


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "frank_wolfe": FrankWolfe,
}

LEARNED = {
    "binary": (mask_of, masked),
    "free": (lambda values: [values.clone()], lambda raw: raw),
    "clip": (lambda values: [values.clone()], lambda raw: raw.clamp(0, 1)),
    "sigmoid": (lambda values: [values.logit()], torch.sigmoid),
    "simplex_with_base": (lambda values: [values.clone()], lambda raw: raw),
    "positions": (position_of, lambda position, scale: scale * position.softmax(0)[1:]),
}
"""By constraint: from coefficients `[K, ...]` to the tensors that are learned, and back."""


def losses(recipe: Recipe, reference: Reference, merged: Tensors, batch: Batch):
    """The loss of each task on its examples, with its own head."""
    for position, expert in enumerate(reference.experts):
        size = len(batch.weights[0])
        own = np.zeros(size * len(reference.experts), bool)
        own[position * size : (position + 1) * size] = True
        of_texts = {k: v for k, v in batch.inputs.items() if k not in (SLOTS, PLACES)}
        inputs = {k: torch.from_numpy(v[own]) for k, v in of_texts.items()}
        others = {k: torch.from_numpy(v[~own]) for k, v in of_texts.items()}
        parameters = {
            name: merged.get(in_file, expert.get_parameter(name))
            for name, in_file in reference.names.items()
        }
        model = functional_call(expert, parameters, kwargs=inputs | {"output_hidden_states": True})
        with torch.no_grad():
            teacher = expert(**inputs, output_hidden_states=True)
            teacher_cross_task = expert(**others)
        cross_task = functional_call(expert, parameters, kwargs=others), teacher_cross_task
        labels = batch.targets[position].labels
        labels = None if labels is None else torch.from_numpy(np.asarray(labels))
        yield loss_of(recipe, model, teacher, inputs, labels, cross_task)


def learn(
    fields: dict[str, Any], preset: str, **learning: Any
) -> tuple[Recipe, LearningInputs, list]:
    """Runs the package for so many steps, and no step less: the coefficients of each stage."""
    short = {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "evaluate_every": STEPS,
        "rematerialize": "nothing",
    } | learning
    coefficients = dict(fields.get("coefficients", {}))
    if "coarse" in PRESETS[preset]["coefficients"]:
        coefficients["coarse"] = {"steps": STEPS}
    recipe = parse_recipe(
        fields | {"preset": preset, "learning": short, "coefficients": coefficients}
    )
    inputs = learning_inputs(recipe, Path("/"))

    @contextmanager
    def watch(what, steps):
        assert steps == STEPS
        yield lambda progress: None

    found: list[Coefficients] = []
    learn_coefficients(inputs, show_stage=watch, on_result=found.append)
    # The last coefficients are the best on the held-out data, so that they are those of all steps.
    assert [each.step for each in found] == [STEPS] * len(found)
    return recipe, inputs, found


def start_of(sharing: dict[str, Sharing], first: dict[str, np.ndarray]) -> Tensors:
    """Every coefficient where its tensor's is, `[K]` by tensor name."""
    start = {}
    for name, (group, index, directions) in sharing.items():
        values = torch.from_numpy(np.array(first[name], np.float32))
        if directions is not None:
            values = values[:, None].repeat(1, directions.shape[1])
        elif index is not None:
            values = values[:, None].repeat(1, int(index.max()) + 1)
        start[group] = values
    return start


def require_same(
    found: Coefficients, expected: dict[str, np.ndarray], start: Tensors, least: float = 0.95
) -> None:
    assert found.values.keys() == expected.keys()
    for group, values in expected.items():
        np.testing.assert_allclose(found.values[group], values, rtol=0, atol=1e-5, err_msg=group)
    # Nearly all coefficients moved, or as many as are said, each by more than the tolerance.
    moved = np.concatenate([np.abs(expected[g] - start[g].numpy()).ravel() for g in expected])
    assert (moved > 1e-4).mean() > least


# The noise of `concrete` is JAX's: tests/learning/test_papers_updates.py has its loop.
@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"concrete"}))
def test_a_preset_is_its_papers_update(preset, text_recipe):
    learning = {}
    if preset in LONG_STEPS:
        rate = PRESETS[preset]["learning"]["optimizer"]["learning_rate"]
        learning = {"optimizer": {"learning_rate": rate / 10}}
    if preset == "recommended":
        learning["optimizer"]["options"] = {"eps": 1e-3}
        learning["copies"] = 0  # tests/data has them
    if preset in ("recommended", "symerge"):
        text_recipe["heads"] = "kept"  # tests/heads has those that learn
    if preset == "recommended":
        text_recipe["coefficients"] = {"initial": 0.3}  # tests/pipeline has the one that is chosen
    for task in text_recipe["tasks"].values():
        if preset.startswith("atlas"):
            task["calibration"] = {"path": task["test"]["path"], "label": "label"}
    recipe, inputs, found = learn(text_recipe, preset, **learning)
    reference = load_reference(recipe)
    if recipe.interference:
        trim, elect = recipe.interference
        assert (trim.name, elect.name, elect.options) == ("trim", "elect_sign", {})
        reference = reference._replace(deltas=ties(reference.deltas, **trim.options))
    experts = len(reference.experts)
    first = {name: [recipe.initial_coefficient] * experts for name in reference.deltas}
    granularity = recipe.coefficients.granularity
    if granularity == "auto":
        granularity = inputs.method.result.granularity.name
    options = recipe.coefficients.granularity_options

    if preset == "expert-merging++":
        assert len(found) == 2
        coarse = share("tensor", {}, reference.deltas)
        start = start_of(coarse, first)
        expected = pytorch_loop(recipe, reference, inputs.calibration, coarse, start)
        require_same(found[0], expected, start)
        # The second stage starts from the first, cut where that says.
        first = found[0].values
        pieces = importance_pieces(
            {name: reference.base[name].shape for name in reference.deltas},
            first,
            {name: d.flatten(1).norm(dim=1).numpy() for name, d in reference.deltas.items()},
            options["budget"],
        )
        assert found[1].granularity_options == {"pieces": pieces}
        assert max(pieces.values()) > 1
        assert experts * sum(pieces.values()) <= options["budget"] == 2000
        granularity, options = "chunk", {"pieces": pieces}

    sharing = share(granularity, options, reference.deltas)
    start = start_of(sharing, first)
    expected = pytorch_loop(recipe, reference, inputs.calibration, sharing, start)
    # Steps go towards one expert at a time.
    require_same(found[-1], expected, start, least=0.3 if preset == "fw-merging" else 0.95)


def chosen(preset: str, text_recipe: dict[str, Any]) -> Recipe:
    """The recipe that says nothing but which preset."""
    del text_recipe["learning"]
    for task in text_recipe["tasks"].values():
        task["calibration"] = task["test"]  # with labels
    return parse_recipe(text_recipe | {"preset": preset})


@pytest.mark.parametrize("preset", ["adamerging-task", "adamerging", "adamerging++"])
def test_what_adamerging_says(preset, text_recipe):
    recipe = chosen(preset, text_recipe)
    assert recipe.coefficients.granularity == ("task" if preset.endswith("task") else "tensor")
    assert (recipe.coefficients.constraint, recipe.initial_coefficient) == ("clip", 0.3)
    assert [term.name for term in recipe.objectives] == ["entropy"]
    assert not recipe.regularizers and not recipe.keep_from_base
    optimizer = recipe.learning.optimizer
    assert (recipe.learning.steps, optimizer.name, optimizer.learning_rate) == (500, "adam", 1e-3)
    assert optimizer.schedule is None and optimizer.clip_norm is None
    steps = [(step.name, step.options) for step in recipe.interference]
    ties = [("trim", {"density": 0.2}), ("elect_sign", {})]
    assert steps == (ties if preset == "adamerging++" else [])


@pytest.mark.parametrize("preset", ["atlas", "atlas-k"])
def test_what_atlas_says(preset, text_recipe):
    recipe = chosen(preset, text_recipe)
    granularity = ("partition", {"groups": 10}) if preset == "atlas-k" else ("tensor", {})
    own = recipe.coefficients
    assert (own.granularity, own.granularity_options) == granularity
    assert (own.constraint, recipe.initial_coefficient) == ("free", 0.0)
    assert [term.name for term in recipe.objectives] == ["cross_entropy"]
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("adamw", 0.1, 1.0)
    assert optimizer.schedule == "cosine_decay_schedule"
    assert not recipe.interference and not recipe.keep_from_base


@pytest.mark.parametrize("preset", ["expert-merging", "expert-merging++"])
def test_what_expert_merging_says(preset, text_recipe):
    recipe = chosen(preset, text_recipe)
    own = recipe.coefficients
    assert (own.constraint, recipe.initial_coefficient) == ("sigmoid", 0.1)
    assert own.granularity == ("tensor" if preset == "expert-merging" else "importance_chunk")
    assert [term.name for term in recipe.objectives] == [
        "logit_alignment",
        "hidden_state_alignment",
    ]
    (regularizer,) = recipe.regularizers
    assert (regularizer.name, regularizer.options) == ("distance", {"p": 1})
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.clip_norm) == ("adamw", 1.0)
    assert optimizer.schedule == "cosine_warm_restarts"
    assert 5 <= recipe.learning.examples <= 10
    for name in (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.encoder.layer.0.output.dense.bias",
        "vit.encoder.layer.0.layernorm_before.weight",
        "embed_tokens.weight",
        "shared.weight",
        "lm_head.weight",
    ):
        assert any(fnmatchcase(name, pattern) for pattern in recipe.keep_from_base), name
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.pooler.dense.weight"):
        assert not any(fnmatchcase(name, pattern) for pattern in recipe.keep_from_base), name


def test_what_adarank_says(text_recipe):
    recipe = chosen("adarank", text_recipe)
    own = recipe.coefficients
    assert (own.granularity, own.granularity_options, own.constraint) == ("singular", {}, "binary")
    assert recipe.initial_coefficient == 0.3
    assert [term.name for term in recipe.objectives] == ["entropy"]
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adam", 1e-3)
    assert not recipe.regularizers and not recipe.keep_from_base and not recipe.interference


def test_what_symerge_says(text_recipe):
    recipe = chosen("symerge", text_recipe)
    own = recipe.coefficients
    assert (own.granularity, own.constraint, own.initial) == ("tensor", "clip", 0.3)
    assert recipe.heads.kind == "learned"
    assert [term.name for term in recipe.objectives] == ["expert_labels"]
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adam", 0.01)


def test_what_concrete_says(text_recipe):
    recipe = chosen("concrete", text_recipe)
    own = recipe.coefficients
    assert (own.granularity, own.constraint, recipe.initial_coefficient) == (
        "entry",
        "concrete",
        0.3,
    )
    assert [term.name for term in recipe.objectives] == ["entropy"]
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("concrete", 1e-3)
    assert 0 < optimizer.options["mask_steps"] < recipe.learning.steps


def test_what_fw_merging_says(text_recipe):
    recipe = chosen("fw-merging", text_recipe)
    assert recipe.task_vectors.memory == "disk"
    own = recipe.coefficients
    assert (own.granularity, own.constraint) == ("task", "simplex_with_base")
    assert recipe.initial_coefficient == 0
    optimizer = recipe.learning.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("frank_wolfe", 1)
    assert optimizer.schedule == "harmonic"


def test_what_self_positioning_says(text_recipe):
    recipe = chosen("self-positioning", text_recipe)
    own = recipe.coefficients
    assert (own.granularity, own.constraint) == ("task", "positions")
    assert recipe.initial_coefficient == 1 / (len(recipe.tasks) + 1)
    assert [term.name for term in recipe.objectives] == ["logit_alignment"]


def test_the_default_preset():
    assert DEFAULT_PRESET == "recommended"
    assert apply_preset({}) == PRESETS["recommended"]


def test_a_recipes_own_fields_come_first():
    before = copy.deepcopy(PRESETS)
    fields = {
        "preset": "expert-merging",
        "name": "mine",
        "keep_from_base": ["*.bias"],
        "objectives": [{"name": "entropy"}],
        "learning": {"steps": 3, "optimizer": {"learning_rate": 0.2}},
    }
    filled = apply_preset(fields)
    preset = PRESETS["expert-merging"]
    optimizer = preset["learning"]["optimizer"] | {"learning_rate": 0.2}
    assert filled == {
        "preset": "expert-merging",
        "name": "mine",
        # Lists are taken whole.
        "keep_from_base": ["*.bias"],
        "objectives": [{"name": "entropy"}],
        "coefficients": preset["coefficients"],
        "regularizers": preset["regularizers"],
        # Sections are filled up.
        "learning": preset["learning"] | {"steps": 3, "optimizer": optimizer},
    }
    filled["learning"]["optimizer"]["options"]["weight_decay"] = 7
    filled["regularizers"].clear()
    assert before == PRESETS


def test_options_are_those_of_what_is_chosen():
    def fill(section: dict[str, Any], preset: str = "expert-merging++") -> dict[str, Any]:
        return apply_preset({"preset": preset, **section})

    own = fill({"coefficients": {"granularity": "row"}})["coefficients"]
    assert "granularity_options" not in own and own["initial"] == 0.1
    own = fill({"coefficients": {"granularity": "importance_chunk"}})["coefficients"]
    assert own["granularity_options"] == {"budget": 2000}
    optimizer = fill({"learning": {"optimizer": {"name": "sgd"}}})["learning"]["optimizer"]
    assert "options" not in optimizer and "schedule_options" in optimizer
    optimizer = fill({"learning": {"optimizer": {"schedule": None}}})["learning"]["optimizer"]
    assert "schedule_options" not in optimizer and "options" in optimizer
    own = {"granularity": "chunk", "granularity_options": {"pieces": 2}}
    filled = fill({"coefficients": own}, "atlas-k")["coefficients"]
    assert filled["granularity_options"] == {"pieces": 2}


def test_an_unknown_preset_is_refused():
    with pytest.raises(InputError, match="preset: found 'atlass'; expected one of ") as caught:
        apply_preset({"preset": "atlass"})
    assert all(name in str(caught.value) for name in PRESETS)
