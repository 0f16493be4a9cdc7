"""Language models as experts: learning against a plain PyTorch loop, and whole runs."""

import copy
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adamerge_jax.checkpoints import matching
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.file import Coefficients, unstack_values
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.errors import InputError
from adamerge_jax.learning import learner as learning
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.pipeline.learn import LearningInputs, learn_coefficients
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build_objectives
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import (
    TASKS,
    byte_tokenizer,
    give_data,
    rows_of,
    save_models,
    split_sentences,
)
from tests.references import (
    edit_weights,
    learning_inputs,
    random_coefficients,
    rename_weights,
    write_recipe,
)

STEPS = 3
BATCH_SIZE = 4
ROWS = 15
"""Examples of each task: all are padded to 16 tokens, so that one shape is compiled."""

SIZES = dict(
    vocab_size=len(byte_tokenizer()),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LEARNING = dict(steps=STEPS, batch_size=BATCH_SIZE, optimizer=dict(learning_rate=0.02))


def pairs(seed: int) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "response": response} for prompt, response in split_sentences(ROWS, seed)
    ]


def chats(seed: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response.strip()},
            ]
        }
        for prompt, response in split_sentences(ROWS, seed)
    ]


def save_causal(root: Path, model: PreTrainedModel, rows: Any) -> dict[str, Any]:
    """A recipe for a decoder with rows of one kind."""
    fields = save_models(root, model, byte_tokenizer())
    fields = give_data(fields, root, {task: rows(seed) for seed, task in enumerate(TASKS)})
    return fields | {"preset": "adamerging", "learning": LEARNING}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe for a Llama with an output layer of its own, on prompts with responses."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return save_causal(tmp_path_factory.mktemp("llama"), model, pairs)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe for a Qwen2 that reads and writes with one matrix, on conversations."""
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    return save_causal(tmp_path_factory.mktemp("qwen"), model, chats)


def save_t5(root: Path, layers: int, decoder_layers: int) -> dict[str, Any]:
    """A recipe for a T5 of version 1.1, whose tokenizer ends every text, on pairs."""
    config = T5Config(
        vocab_size=SIZES["vocab_size"],
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = T5ForConditionalGeneration(config)
    # transformers ties what the config calls untied, until a file says otherwise.
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    fields = save_models(root, model, byte_tokenizer(added="$A </s>"))
    fields = give_data(fields, root, {task: pairs(seed) for seed, task in enumerate(TASKS)})
    return fields | {"preset": "adamerging", "learning": LEARNING}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe for a T5 whose encoder and decoder have as many layers."""
    return save_t5(tmp_path_factory.mktemp("t5"), layers=2, decoder_layers=2)


class Run(NamedTuple):
    """A finished run of `adamerge learn`."""

    fields: Mapping[str, Any]
    recipe: Path
    folder: Path
    screen: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def coefficients(self) -> Path:
        return self.folder / "coefficients.safetensors"

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The table of results by method."""
        rows = json.loads((self.folder / "results.json").read_text())["rows"]
        return {row["method"]: row for row in rows}

    def further(self, metric: str) -> dict[str, dict[str, float]]:
        """The scores by task of each method, by another metric."""
        tables = json.loads((self.folder / "results.json").read_text())["further"]
        (table,) = [table for table in tables if table["rows"][0]["metric"] == metric]
        return {row["method"]: row["tasks"] for row in table["rows"]}


def learn(folder: Path, fields: Mapping[str, Any]) -> Run:
    recipe = write_recipe(folder, fields)
    with redirect_stdout(io.StringIO()) as screen:
        cli.main(["learn", str(recipe), "--out", str(folder / "run")])
    return Run(fields, recipe, folder / "run", screen.getvalue())


@pytest.fixture(scope="module")
def qwen_run(qwen, tmp_path_factory) -> Run:
    terms = [{"name": "cross_entropy"}, {"name": "logit_alignment", "options": {"top_tokens": 16}}]
    return learn(tmp_path_factory.mktemp("qwen-run"), qwen | {"objectives": terms})


@pytest.fixture(scope="module")
def t5_run(t5, tmp_path_factory) -> Run:
    terms = [
        {"name": "cross_entropy"},
        {"name": "hidden_state_alignment", "options": {"layers": [-1]}},
    ]
    return learn(tmp_path_factory.mktemp("t5-run"), t5 | {"objectives": terms})


def weights(folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model.safetensors")


# Learning, against PyTorch.


def response_labels(ids: torch.Tensor, prompts: Mapping[tuple[int, ...], int]) -> torch.Tensor:
    """Labels as a PyTorch user gives them: the ids where the response is, not shifted."""
    labels = ids.clone()
    for row, own in enumerate(ids.tolist()):
        text = tuple(token for token in own if token != 0)
        labels[row, : prompts[text]] = NOT_PREDICTED
        labels[row, len(text) :] = NOT_PREDICTED
    return labels


def prompt_positions(ids: Sequence[int], prompts: Mapping[tuple[int, ...], int]) -> torch.Tensor:
    """True where the next token is the prompt's, and not every prompt of the task begins so."""
    text = tuple(token for token in ids if token != 0)
    shared = next(place for place in range(len(text)) if len({own[place] for own in prompts}) > 1)
    places = torch.arange(len(ids) - 1)
    return (places + 1 >= shared) & (places + 1 < prompts[text])


def pytorch_loop(fields: Mapping[str, Any], batches: Sequence[Any]) -> tuple[dict, list]:
    """Learning as a PyTorch user would write it: each task in turn, one merged state dict.

    Returns:
        Coefficients `[K]` by tensor, and the objective of each task at each step.
    """
    base = LlamaForCausalLM.from_pretrained(fields["base"]).eval().requires_grad_(False)
    experts = [
        LlamaForCausalLM.from_pretrained(task["expert"]).eval().requires_grad_(False)
        for task in fields["tasks"].values()
    ]
    tokenizer = AutoTokenizer.from_pretrained(fields["base"])
    prompts = []
    for task in fields["tasks"].values():
        own = {}
        for row in rows_of(task["calibration"]):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [*prompt, *tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
            own[tuple(ids)] = len(prompt)
        prompts.append(own)
    start = base.state_dict()
    deltas = {
        name: torch.stack([expert.state_dict()[name] - array for expert in experts])
        for name, array in start.items()
    }
    raw = {name: torch.full((len(experts),), 0.3, requires_grad=True) for name in deltas}
    optimizer = torch.optim.Adam(raw.values(), lr=0.02)
    objectives = []
    for batch in batches:
        merged = {
            name: array + torch.tensordot(raw[name].clamp(0, 1), deltas[name], dims=1)
            for name, array in start.items()
        }
        losses = []
        for position, expert in enumerate(experts):
            own = slice(position * BATCH_SIZE, (position + 1) * BATCH_SIZE)
            inputs = {name: torch.tensor(array[own]).long() for name, array in batch.inputs.items()}
            labels = response_labels(inputs["input_ids"], prompts[position])[:, 1:]
            logits = functional_call(base, merged, kwargs=inputs).logits[:, :-1]
            with torch.no_grad():
                wanted = expert(**inputs).logits[:, :-1].softmax(-1)
            examples = []
            for row, ids in enumerate(inputs["input_ids"].tolist()):
                predicted = labels[row] >= 0
                read = prompt_positions(ids, prompts[position])
                examples.append(
                    cross_entropy(logits[row][predicted], labels[row][predicted])
                    + cross_entropy(logits[row][predicted], wanted[row][predicted])
                    + 0.3
                    * cross_entropy(logits[row][read], wanted[row][read], reduction="sum")
                    / max(1, read.sum())
                )
            losses.append(torch.stack(examples).mean())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        objectives.append([loss.item() for loss in losses])
    return {name: values.detach().clamp(0, 1).numpy() for name, values in raw.items()}, objectives


def test_same_coefficients_as_a_pytorch_loop(llama, tmp_path):
    recipe = parse_recipe(
        llama
        | {
            "objectives": [
                {"name": "cross_entropy"},
                {"name": "logit_alignment", "options": {"top_tokens": None}},
            ]
        }
    )
    inputs = learning_inputs(recipe, tmp_path)
    workspace = inputs.workspace
    granularity = make_granularity("tensor", {}, inputs.shapes)
    learner = learning.make_learner(
        forward_with_heads(workspace.backbone, list(workspace.head_networks.values())),
        granularity,
        CONSTRAINTS["clip"],
        list(build_objectives(recipe.objectives, recipe.tasks).values()),
        build_optimizer(recipe.learning.optimizer, STEPS),
    )
    frozen = learning.Frozen(inputs.base, inputs.deltas, list(workspace.heads.values()))
    assert frozen.heads == [{}] * len(TASKS)
    state = learner.init(granularity.init(constant(inputs.shapes, inputs.experts, 0.3)))
    batches = list(islice(inputs.calibration.batches(), STEPS))
    objectives = []
    for batch in batches:
        assert batch.inputs["input_ids"].shape == (len(TASKS) * BATCH_SIZE, 16)
        assert all(targets.prompts.any() for targets in batch.targets)
        state, per_task = learner.step(state, frozen, batch)
        objectives.append(per_task)
    learned = unstack_values(learner.coefficients(state))
    expected, losses = pytorch_loop(llama, batches)
    # Both in float32; sums in another order change the last digits.
    np.testing.assert_allclose(objectives, losses, rtol=0, atol=1e-5)
    assert learned.keys() == expected.keys()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < learned.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(learned[name], values, rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(values - 0.3).max() for values in expected.values()) > 0.03


class Watch(list):
    """What the learning loop reports."""

    @contextmanager
    def __call__(self, what: str, steps: int):
        yield self.append


def inputs_of(fields: Mapping[str, Any], folder: Path, **changes: Any) -> LearningInputs:
    recipe = parse_recipe(dict(fields) | changes)
    return learning_inputs(recipe, folder)


def test_the_recommended_preset_asks_nothing_of_other_tasks(llama, tmp_path):
    """Language models share one head, so that experts would contradict each other."""
    fields = {name: value for name, value in llama.items() if name != "preset"}
    chosen = {"steps": 2, "batch_size": BATCH_SIZE}
    recommended = inputs_of(fields, tmp_path, learning=chosen)
    recipe = parse_recipe(fields)
    assert recipe.preset == "recommended"
    assert recipe.objectives[0].options == {"cross_task": 0.6}
    assert recommended.calibration.cross_task == {}
    batch = next(recommended.calibration.batches())
    assert all(targets.cross_task is None for targets in batch.targets)
    assert all(targets.expert_top.tokens.ndim == 3 for targets in batch.targets)
    plain = inputs_of(fields, tmp_path, learning=chosen, objectives=[{"name": "logit_alignment"}])
    merges = []
    for inputs in (recommended, plain):
        seen = Watch()
        merges.append((learn_coefficients(inputs, show_stage=seen), seen))
    (first, seen), (second, also_seen) = merges
    assert first.values is not second.values
    assert first.coefficients.values["lm_head.weight"].shape == (len(TASKS), SIZES["vocab_size"])
    for name, values in first.coefficients.values.items():
        np.testing.assert_array_equal(values, second.coefficients.values[name])
    for one, other in zip(seen, also_seen, strict=True):
        np.testing.assert_array_equal(one.per_task, other.per_task)
        np.testing.assert_array_equal(one.held_out.objective, other.held_out.objective)
    assert (seen[2].held_out.objective != seen[0].held_out.objective).all()


def test_forgetting_with_control_asks_no_expert(llama, tmp_path):
    """What is controlled is how many tokens are right, and the texts say which are."""
    first, *others = TASKS
    terms = [
        {"name": "cross_entropy", "weight": {first: -1}},
        {"name": "cross_entropy", "weight": dict.fromkeys(others, 1)},
    ]
    inputs = inputs_of(llama, tmp_path, objectives=terms, learning=LEARNING | {"control": 0.9})
    for targets in next(inputs.calibration.batches()).targets:
        assert targets.expert_logits is None and targets.expert_top is None
        assert targets.labels.shape == (BATCH_SIZE, 16)


# Whole runs.


def mean_loss(
    model: PreTrainedModel, examples: Sequence[tuple[dict[str, list[int]], list[int]]]
) -> float:
    """What `transformers` says, example by example without padding, as a mean over tokens."""
    total, count = 0.0, 0
    for inputs, labels in examples:
        arrays = {name: torch.tensor([values]) for name, values in inputs.items()}
        with torch.no_grad():
            loss = model(**arrays, labels=torch.tensor([labels])).loss
        # Decoders predict no first token.
        counted = sum(label != NOT_PREDICTED for label in labels[0 if len(inputs) > 1 else 1 :])
        total += loss.item() * counted
        count += counted
    return total / count


def token_accuracy(
    model: PreTrainedModel, examples: Sequence[tuple[dict[str, list[int]], list[int]]]
) -> float:
    """The share of likeliest tokens among those to be predicted, by `transformers`."""
    right, count = 0, 0
    for inputs, labels in examples:
        if len(inputs) > 1:  # an encoder-decoder's, which predicts each of its labels
            inputs = inputs | {"decoder_input_ids": [0, *labels[:-1]]}
            following = labels
        else:
            following = [*labels[1:], NOT_PREDICTED]
        arrays = {name: torch.tensor([values]) for name, values in inputs.items()}
        with torch.no_grad():
            likeliest = model(**arrays).logits[0].argmax(-1).tolist()
        pairs = zip(likeliest, following, strict=True)
        counted = [token == label for token, label in pairs if label != NOT_PREDICTED]
        right += sum(counted)
        count += len(counted)
    return right / count


def chat_examples(file: str, tokenizer: Any) -> list[tuple[dict[str, list[int]], list[int]]]:
    found = []
    for row in rows_of(file):
        reference = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, masks = reference["input_ids"], reference["assistant_masks"]
        labels = [i if mask else NOT_PREDICTED for i, mask in zip(ids, masks, strict=True)]
        found.append(({"input_ids": ids}, labels))
    return found


def pair_examples(file: str, tokenizer: Any) -> list[tuple[dict[str, list[int]], list[int]]]:
    found = []
    for row in rows_of(file):
        prompt = tokenizer(row["prompt"])["input_ids"]
        inputs = {"input_ids": prompt, "attention_mask": [1] * len(prompt)}
        found.append((inputs, tokenizer(row["response"])["input_ids"]))
    return found


@pytest.mark.parametrize(
    ("kind", "loader", "examples"),
    [
        ("qwen_run", AutoModelForCausalLM, chat_examples),
        ("t5_run", AutoModelForSeq2SeqLM, pair_examples),
    ],
)
def test_the_losses_in_the_table(kind, loader, examples, request):
    """Of the exported checkpoint, the base and the experts, by `transformers` itself."""
    run = request.getfixturevalue(kind)
    rows = run.rows
    assert list(rows) == [
        "base",
        "experts (one model each)",
        "average",
        "task arithmetic (0.3)",
        "learned (tensor)",
    ]
    assert {row["metric"] for row in rows.values()} == {"loss"}
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
    merged, info = loader.from_pretrained(run.checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = loader.from_pretrained(run.fields["base"]).eval()
    for task, fields in run.fields["tasks"].items():
        own = examples(fields["test"]["path"], tokenizer)
        expert = loader.from_pretrained(fields["expert"]).eval()
        for method, model in [
            ("learned (tensor)", merged.eval()),
            ("base", base),
            ("experts (one model each)", expert),
        ]:
            expected = mean_loss(model, own)
            assert rows[method]["tasks"][task] == pytest.approx(expected, abs=1e-4)
            accuracy = run.further("token_accuracy")[method][task]
            assert accuracy == pytest.approx(token_accuracy(model, own))
    card = (run.checkpoint / "README.md").read_text()
    assert f"| {rows['base']['average']:.3f} |" in card
    for title in ("Exact match", "Token accuracy", "Loss without the ends of texts"):
        assert title in run.screen and title in card
    assert "note: general ability is not watched" in run.screen
    # It is said which tokens these are.
    assert f"end of text: append ({', '.join(TASKS)})" in " ".join(run.screen.split())
    record = json.loads((run.folder / "run.json").read_text())
    assert record["end_of_text"] == dict.fromkeys(TASKS, "append")


def test_the_export_writes_texts(qwen_run, qwen):
    """With the files of the tokenizer that it brings."""
    names = {file.name for file in Path(qwen["base"]).iterdir()} - {"model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert names < {file.name for file in qwen_run.checkpoint.iterdir()}
    assert not (qwen_run.checkpoint / "tasks").exists()
    tokenizer = AutoTokenizer.from_pretrained(qwen_run.checkpoint)
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    model = AutoModelForCausalLM.from_pretrained(qwen_run.checkpoint)
    assert type(model) is Qwen2ForCausalLM
    messages = rows_of(qwen["tasks"]["naming"]["test"]["path"])[0]["messages"][:1]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert written.shape == (1, prompt["input_ids"].shape[1] + 6)
    logits = model(**prompt).logits[0, -1]
    assert written[0, prompt["input_ids"].shape[1]] == logits.argmax()


def test_coefficients_moved(qwen_run, t5_run):
    for run in (qwen_run, t5_run):
        coefficients = Coefficients.load(run.coefficients)
        assert coefficients.values.keys() == set(coefficients.parameters)
        assert max(abs(values - 0.3).max() for values in coefficients.values.values()) > 0.01


def require_fold(
    written: Mapping[str, np.ndarray], fields: Mapping[str, Any], file: Path, without: str = ""
) -> None:
    """The checkpoint holds `theta + sum lambda tau` of every tensor but `without`."""
    values = Coefficients.load(file).values
    base = weights(fields["base"])
    experts = [weights(task["expert"]) for task in fields["tasks"].values()]
    assert written.keys() == base.keys() - {without}
    for name, array in written.items():
        scale = values.get(name, np.zeros(len(experts))).astype(np.float64)
        deltas = [expert[name].astype(np.float64) - base[name] for expert in experts]
        expected = base[name] + np.tensordot(scale, deltas, axes=1)
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6, err_msg=name)
        assert (array != base[name]).any() == (not name.endswith("k_proj.bias")), name


def test_one_matrix_is_exported_once(qwen_run, qwen):
    written = weights(qwen_run.checkpoint)
    assert "lm_head.weight" not in written
    require_fold(written, qwen, qwen_run.coefficients)


def test_an_output_layer_of_its_own_is_merged(t5_run, t5):
    written = weights(t5_run.checkpoint)
    assert {"lm_head.weight", "shared.weight"} < written.keys()
    require_fold(written, t5, t5_run.coefficients)
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_run.checkpoint)
    np.testing.assert_array_equal(model.lm_head.weight.detach(), written["lm_head.weight"])
    np.testing.assert_array_equal(model.shared.weight.detach(), written["shared.weight"])
    assert model.config.scale_decoder_outputs is False


def fold(fields: Mapping[str, Any], folder: Path, file: Path | None = None) -> Path:
    """`adamerge fold` with these coefficients, or with random ones."""
    if file is None:
        file = folder / "coefficients.safetensors"
        random_coefficients(open_models(parse_recipe(dict(fields)), folder)).save(file)
    recipe = write_recipe(folder, fields)
    cli.main(["fold", str(recipe), str(file), "--out", str(folder / "out")])
    return folder / "out" / "checkpoint"


def test_a_decoders_output_layer_is_merged(llama, tmp_path):
    checkpoint = fold(llama, tmp_path)
    written = weights(checkpoint)
    assert "lm_head.weight" in written
    require_fold(written, llama, tmp_path / "coefficients.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    np.testing.assert_array_equal(model.lm_head.weight.detach(), written["lm_head.weight"])


def test_a_second_name_of_one_matrix_is_dropped(qwen, tmp_path):
    """Some files hold the tied matrix under both of its names."""
    tied = dict(qwen) | {"base": str(shutil.copytree(qwen["base"], tmp_path / "base"))}

    def repeat(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_weights(tmp_path / "base", repeat)
    written = weights(fold(tied, tmp_path))
    require_fold(written, tied, tmp_path / "coefficients.safetensors", without="lm_head.weight")


@pytest.mark.parametrize("model", ["base", TASKS[1]])
@pytest.mark.parametrize("row", [0, -1])
def test_two_matrices_that_are_said_to_be_one(qwen, tmp_path, model, row, monkeypatch):
    """`transformers` does not tie them then, so neither stands for both."""
    # Of the table's 6400 values.
    monkeypatch.setattr(matching, "_COMPARED_VALUES", 1000)
    fields = copy.deepcopy(qwen)
    owner, field = (fields, "base") if model == "base" else (fields["tasks"][model], "expert")
    owner[field] = str(shutil.copytree(owner[field], tmp_path / "copy"))

    def part(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][row, -1] += 1

    edit_weights(tmp_path / "copy", part)
    said = (
        rf"{model}.* \({tmp_path / 'copy'}\) has an lm_head.weight that differs from "
        r"model.embed_tokens.weight, while its config.json says that they are one"
    )
    with pytest.raises(InputError, match=said):
        open_models(parse_recipe(fields), tmp_path)
    open_models(parse_recipe(fields), tmp_path, read_weights=False)


def test_one_matrix_under_its_second_name(qwen, tmp_path):
    fields = copy.deepcopy(qwen)
    fields["base"] = str(shutil.copytree(qwen["base"], tmp_path / "base"))
    expert = fields["tasks"][TASKS[0]]
    expert["expert"] = str(shutil.copytree(expert["expert"], tmp_path / "expert"))
    for folder in ("base", "expert"):
        rename_weights(
            tmp_path / folder,
            lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name,
        )
    written = weights(fold(fields, tmp_path))
    require_fold(written, qwen, tmp_path / "coefficients.safetensors")


def test_fold_writes_the_same_checkpoint(qwen_run, qwen, tmp_path):
    checkpoint = fold(qwen, tmp_path, qwen_run.coefficients)
    learned, folded = weights(qwen_run.checkpoint), weights(checkpoint)
    assert learned.keys() == folded.keys()
    for name, array in learned.items():
        np.testing.assert_array_equal(folded[name], array)
    names = {file.name for file in qwen_run.checkpoint.iterdir()}
    assert {file.name for file in checkpoint.iterdir()} == names


@pytest.mark.parametrize("kind", ["qwen_run", "t5_run"])
def test_evaluate_gives_the_learned_row(kind, request, capsys):
    run = request.getfixturevalue(kind)
    cli.main(["evaluate", str(run.recipe), "--checkpoint", str(run.checkpoint)])
    printed = capsys.readouterr().out
    learned = run.rows["learned (tensor)"]
    cells = [f"{value:.3f}" for value in [*learned["tasks"].values(), learned["average"]]]
    line = next(line for line in printed.splitlines() if cells[-1] in line)
    assert line.replace("│", " ").split()[-len(cells) :] == cells


def test_inspect(qwen_run, capsys):
    cli.main(["inspect", str(qwen_run.coefficients)])
    printed = capsys.readouterr().out
    assert "objective      cross_entropy + logit_alignment" in printed
    for layer in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"):
        assert layer in printed


# What is asked of checkpoints and data.


def forget_start(folder: Path, *files: str) -> None:
    for name in files:
        fields = json.loads((folder / name).read_text())
        del fields["decoder_start_token_id"]
        (folder / name).write_text(json.dumps(fields))


def test_what_responses_start_with(t5, tmp_path):
    """`transformers` 5 may write it to either file."""
    base = shutil.copytree(t5["base"], tmp_path / "base")
    recipe = parse_recipe(dict(t5) | {"base": str(base)})
    forget_start(base, "config.json")
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder_start_token_id": 5}))
    inputs = open_workspace(recipe, tmp_path).data.calibration["naming"].take(np.array([0, 3]), 16)
    assert inputs["decoder_input_ids"][:, 0].tolist() == [5, 5]
    forget_start(base, "generation_config.json")
    with pytest.raises(InputError, match=r"base .*: decoder_start_token_id is neither in its con"):
        open_workspace(recipe, tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="decoder_start_token_id is neither"):
        open_workspace(recipe, tmp_path)


def test_hidden_states_are_the_decoders(tmp_path):
    fields = save_t5(tmp_path, layers=3, decoder_layers=1)

    def pose_with(layers: list[int]) -> LearningInputs:
        term = {"name": "hidden_state_alignment", "options": {"layers": layers}}
        recipe = parse_recipe(fields | {"objectives": [term]})
        return learning_inputs(recipe, tmp_path)

    for layer in (2, -3):
        with pytest.raises(InputError, match=rf"layer {layer} .* to 1, or -1 \(the last\) to -2"):
            pose_with([layer])
    pose_with([1, -2])


def test_numpy_files(llama, tmp_path):
    """A language model's labels are its texts, which arrays do not tell."""
    np.savez(tmp_path / "data.npz", input_ids=np.ones((9, 8), np.int32))
    fields = json.loads(json.dumps(llama))
    fields["tasks"]["naming"]["calibration"] = str(tmp_path / "data.npz")
    with pytest.raises(InputError, match=r"calibration data of task 'naming': .*not NumPy arrays"):
        open_workspace(parse_recipe(fields), tmp_path)


def test_an_expert_with_another_tokenizer(llama, tmp_path):
    folder = shutil.copytree(llama["tasks"]["naming"]["expert"], tmp_path / "other")
    byte_tokenizer(eos_token="<|end|>").save_pretrained(folder)
    fields = json.loads(json.dumps(llama))
    fields["tasks"]["naming"]["expert"] = str(folder)
    with pytest.raises(InputError, match=r"expert 'naming' .* has eos_token"):
        open_workspace(parse_recipe(fields), tmp_path)


def test_pseudo_labels_are_for_classes(llama, tmp_path):
    with pytest.raises(InputError, match="pseudo_labels is for classes"):
        inputs_of(llama, tmp_path, objectives=[{"name": "pseudo_labels"}])
    with pytest.raises(InputError, match="expert_labels is for classes"):
        inputs_of(llama, tmp_path, objectives=[{"name": "expert_labels"}])
