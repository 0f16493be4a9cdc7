"""The end of texts: which tokens count in the table of results, and what the experts say of it."""

import copy
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import (
    SPECIAL,
    TASKS,
    byte_tokenizer,
    save_models,
    split_sentences,
)
from tests.references import randomise, write_json_lines

PAD, EOS, END = (SPECIAL.index(token) for token in ("<pad>", "</s>", "<|end|>"))
START = 7
TOKENIZER = byte_tokenizer()

LLAMA = LlamaConfig(
    vocab_size=len(TOKENIZER),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    pad_token_id=PAD,
    eos_token_id=EOS,
)
T5 = T5Config(
    vocab_size=len(TOKENIZER),
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=START,
)

Ids = tuple[list[int], list[int]]
"""The tokens of an example, and those that are to be predicted in their places, else -100."""

SENTENCES = split_sentences(7, seed=1)
PAIRS = [{"prompt": prompt, "response": response} for prompt, response in SENTENCES]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "sing"},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response.strip()},
            {"role": "user", "content": "and ?"},
            {"role": "assistant", "content": "no"},
        ]
    }
    for prompt, response in SENTENCES
]
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": ([{"text": prompt + response} for prompt, response in SENTENCES], {}),
    "packed": ([{"text": prompt + response} for prompt, response in SENTENCES], {"packed": True}),
    "pairs": (PAIRS, {}),
    "all of pairs": (PAIRS, {"predict": "all"}),
    "chats": (CHATS, {}),
}
MAX_LENGTH = 64


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def reference_ids(kind: str, end: bool) -> list[Ids]:
    """The examples of a kind for a decoder of `transformers`, which shifts labels itself."""
    rows, fields = KINDS[kind]
    examples = []
    for row in rows:
        if "messages" in row:
            written = TOKENIZER.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            pairs = zip(written["input_ids"], written["assistant_masks"], strict=True)
            labels = [i if marked and (end or i != END) else -100 for i, marked in pairs]
            examples.append((written["input_ids"], labels))
            continue
        prompt = encode(row.get("prompt", ""))
        response = encode(row["response"] if "response" in row else row["text"])
        response += [EOS] * end
        first = prompt if fields.get("predict") == "all" else [-100] * len(prompt)
        examples.append((prompt + response, first + response))
    if "packed" in fields:
        ids = [token for tokens, _ in examples for token in tokens]
        pieces = [ids[at : at + MAX_LENGTH] for at in range(0, len(ids), MAX_LENGTH)]
        examples = [(piece, piece) for piece in pieces]
    return examples


@torch.no_grad()
def mean_loss(model: PreTrainedModel, examples: Sequence[Ids], decoder: bool = True) -> float:
    """Over all tokens that are to be predicted, by `transformers`, one example at a time."""
    total, count = 0.0, 0
    for ids, labels in examples:
        predicted = sum(label != -100 for label in labels[int(decoder) :])
        inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        total += model(**inputs).loss.item() * predicted
        count += predicted
    return total / count


def score_experts(workspace: Workspace) -> dict[str, float]:
    """As the table of results has it."""
    base = workspace.base()
    return {
        task: workspace.evaluator.score(workspace.expert(task, base), task, examples)
        for task, examples in workspace.data.test.items()
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with a task for each kind of data, of three experts of a Llama."""
    root = tmp_path_factory.mktemp("llama")
    fields = save_models(root, LlamaForCausalLM(LLAMA), TOKENIZER)
    tasks = {}
    for number, (kind, (rows, options)) in enumerate(KINDS.items()):
        file = write_json_lines(root / f"{number}.jsonl", rows)
        expert = fields["tasks"][TASKS[number % len(TASKS)]]
        tasks[kind.replace(" ", "_")] = expert | {
            "calibration": {"path": str(file), **options},
            "test": {"path": str(file), **options},
        }
    evaluation = {"batch_size": 4}  # the last batch is not full
    return fields | {"tasks": tasks, "max_length": MAX_LENGTH, "evaluation": evaluation}


@pytest.mark.parametrize("end", ["append", "leave"])
def test_losses_of_decoders(llama, end):
    fields = copy.deepcopy(llama)
    for task in fields["tasks"].values():
        task["test"]["end_of_text"] = end  # and so for the calibration data
    workspace = open_workspace(parse_recipe(fields), Path("/"))
    assert {data.end_of_text for data in workspace.data.calibration.values()} == {end}
    assert not workspace.asked_ends
    scores = score_experts(workspace)
    for kind in KINDS:
        task = kind.replace(" ", "_")
        expert = AutoModelForCausalLM.from_pretrained(fields["tasks"][task]["expert"]).eval()
        expected = mean_loss(expert, reference_ids(kind, end == "append"))
        assert scores[task] == pytest.approx(expected, abs=1e-4), kind
        # The other tokens are others.
        other = mean_loss(expert, reference_ids(kind, end != "append"))
        assert abs(other - expected) > 1e-3


@pytest.mark.parametrize("end", ["append", "leave"])
@pytest.mark.parametrize("adding", [True, False])
def test_losses_of_an_encoder_decoder(tmp_path, end, adding):
    tokenizer = byte_tokenizer(added="$A </s>") if adding else TOKENIZER
    fields = save_models(tmp_path, T5ForConditionalGeneration(T5), tokenizer)
    file = str(write_json_lines(tmp_path / "pairs.jsonl", PAIRS))
    data = {"path": file, "end_of_text": end}
    fields["tasks"] = {"only": fields["tasks"][TASKS[0]] | {"calibration": data, "test": data}}
    scores = score_experts(open_workspace(parse_recipe(fields), Path("/")))
    expert = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / TASKS[0]).eval()
    examples = [
        (tokenizer(row["prompt"])["input_ids"], encode(row["response"]) + [EOS] * (end == "append"))
        for row in PAIRS
    ]
    expected = mean_loss(expert, examples, decoder=False)
    assert scores["only"] == pytest.approx(expected, abs=1e-4)


def train(model: PreTrainedModel, examples: Sequence[Ids]) -> PreTrainedModel:
    """Fine-tunes a model until it has learned what follows what."""
    model = copy.deepcopy(model).train()
    longest = max(len(ids) for ids, _ in examples)
    ids, labels = (
        torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
        for rows, filler in zip(zip(*examples, strict=True), (PAD, -100), strict=True)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two experts that have learned to answer; `ending` has learned to end as well."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA)
    randomise(base)
    base.save_pretrained(root / "base")
    TOKENIZER.save_pretrained(root / "base")
    tasks = {}
    for task, end in [("ending", True), ("endless", False)]:
        train(base, reference_ids("pairs", end)).save_pretrained(root / task)
        file = str(write_json_lines(root / f"{task}.jsonl", PAIRS))
        tasks[task] = {"expert": str(root / task), "calibration": file, "test": file}
    learning = {"steps": 1, "batch_size": 2}
    return {"base": str(root / "base"), "tasks": tasks, "max_length": 32, "learning": learning}


def test_experts_are_asked(trained):
    workspace = open_workspace(parse_recipe(trained), Path("/"))
    for data in workspace.data.calibration, workspace.data.test:
        ends = {task: examples.end_of_text for task, examples in data.items()}
        assert ends == {"ending": "append", "endless": "leave"}
    scores = score_experts(workspace)
    for task, end in [("ending", True), ("endless", False)]:
        expert = AutoModelForCausalLM.from_pretrained(trained["tasks"][task]["expert"]).eval()
        expected = mean_loss(expert, reference_ids("pairs", end))
        assert scores[task] == pytest.approx(expected, abs=1e-4)
        assert scores[task] < 1 < mean_loss(expert, reference_ids("pairs", not end)) or end
        # The median over the examples of the token's probability.
        probabilities = []
        for ids, _ in reference_ids("pairs", False):
            with torch.no_grad():
                logits = expert(input_ids=torch.tensor([ids])).logits[0, -1]
            probabilities.append(torch.softmax(logits, -1)[EOS].item())
        asked = workspace.asked_ends[task]
        assert asked == pytest.approx(float(np.exp(np.median(np.log(probabilities)))), rel=1e-3)
    assert workspace.asked_ends["ending"] > 0.5 > 0.01 > workspace.asked_ends["endless"]


def test_adapters_and_one_answer_for_all_data(trained, tmp_path):
    """An adapter is asked upon its base; data that name an end speak for those that do not."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(trained["base"])
    options = {"r": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]}
    torch.manual_seed(1)
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    train(adapter, reference_ids("pairs", True)).save_pretrained(tmp_path / "adapter")
    fields = copy.deepcopy(trained)
    fields["tasks"]["ending"]["expert"] = str(tmp_path / "adapter")
    del fields["tasks"]["endless"]["test"], fields["tasks"]["ending"]["test"]
    fields["tasks"]["endless"]["validation"] = fields["tasks"]["endless"]["calibration"]
    validation = {"path": fields["tasks"]["ending"]["calibration"]}
    fields["tasks"]["ending"]["validation"] = validation
    workspace = open_workspace(parse_recipe(fields), Path("/"))
    assert workspace.data.validation["ending"].end_of_text == "append"
    assert workspace.asked_ends["ending"] > 0.5
    validation["end_of_text"] = "leave"
    workspace = open_workspace(parse_recipe(fields), Path("/"))
    assert workspace.data.calibration["ending"].end_of_text == "leave"
    assert workspace.asked_ends.keys() == {"endless"}


def test_an_evaluation_says_it(trained):
    screen = io.StringIO()
    console = Console(file=screen, width=10_000)
    evaluate(parse_recipe(trained), trained["base"], root=Path("/"), console=console)
    expected = r"end of text: append \(ending [\d.]+\), leave \(endless [\d.e-]+\)\n"
    assert re.search(expected, screen.getvalue())


def test_the_plan_asks_nobody(trained):
    """It counts the token, with which sequences are longest."""
    fields = copy.deepcopy(trained)
    auto = outline(parse_recipe(fields), Path("/")).data["calibration"]["endless"].lengths
    for task in fields["tasks"].values():
        task["test"] = {"path": task["test"], "end_of_text": "append"}
    appended = outline(parse_recipe(fields), Path("/")).data["calibration"]["endless"].lengths
    np.testing.assert_array_equal(auto, appended)


def test_ends_that_contradict_each_other(trained):
    fields = copy.deepcopy(trained)
    task = fields["tasks"]["ending"]
    task["calibration"] = {"path": "a.jsonl", "end_of_text": "append"}
    task["test"] = {"path": "a.jsonl", "end_of_text": "leave"}
    with pytest.raises(InputError, match=r"calibration\.end_of_text is append, test\.end_of"):
        parse_recipe(fields)
    task["test"]["end_of_text"] = "append"
    assert parse_recipe(fields).tasks["ending"].source("test").end_of_text == "append"
    task["test"]["end_of_text"] = "yes"
    with pytest.raises(InputError, match="end_of_text"):
        parse_recipe(fields)
