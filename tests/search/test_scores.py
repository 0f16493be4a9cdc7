"""Scores of language models, on answers that the experts give themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.learn import LearningInputs, prepare
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.search.candidates import Candidates
from adamerge_jax.search.scores import on_validation_data, task_score
from adamerge_jax.search.search_coefficients import method_without_objective
from tests.language_references import TASKS, byte_tokenizer, save_models, split_sentences
from tests.references import write_json_lines


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> LearningInputs:
    """Three experts with short answers, and of the last one texts alone."""
    root, tokenizer = tmp_path_factory.mktemp("answers"), byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    fields = save_models(root, LlamaForCausalLM(config), tokenizer)
    for seed, task in enumerate(TASKS):
        pairs = split_sentences(8, seed)
        rows: list[dict[str, Any]] = [{"text": prompt + rest} for prompt, rest in pairs]
        if task != TASKS[-1]:
            expert = LlamaForCausalLM.from_pretrained(root / task)
            rows = [
                {"prompt": prompt, "response": answer(expert, tokenizer, prompt)}
                for prompt, _ in pairs
            ]
        data = {"path": str(write_json_lines(root / f"{task}.jsonl", rows)), "end_of_text": "leave"}
        fields["tasks"][task] |= {"calibration": data, "validation": data}
    recipe = parse_recipe(fields | {"evaluation": {"exact_match": True, "batch_size": 8}})
    workspace = open_workspace(recipe, root)
    return prepare(method_without_objective(recipe, workspace.models), workspace)


def answer(expert: LlamaForCausalLM, tokenizer: Any, prompt: str) -> str:
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = expert.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0, tokens.shape[1] :]) or " ."


def test_exact_match_is_that_of_the_table(inputs: LearningInputs):
    workspace, candidates = inputs.workspace, Candidates(inputs, 1)
    match = task_score("exact_match", workspace, "search")
    assert match.tasks(workspace, "search.score") == list(TASKS[:2])
    score = on_validation_data(match, workspace, match.tasks(workspace, "search.score"))
    assert score.words == f"exact match on the validation data of {TASKS[0]}, {TASKS[1]}"
    assert score.maximise
    for point in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.3]):
        measured = score.measure(candidates, np.array(point))
        parameters = candidates.parameters(np.array(point))
        for task, value in measured.items():
            examples = workspace.data.validation[task]
            table = workspace.evaluator.measures(parameters, task, examples)["exact_match"]
            assert value == table.mean
        for at, task in enumerate(TASKS[:2]):
            if point[at] == 1:  # the expert, but not each answer's text is read as it was written
                assert measured[task] > 0.3


def test_tasks_can_be_chosen(inputs: LearningInputs):
    match = task_score("exact_match", inputs.workspace, "search")
    assert match.tasks(inputs.workspace, "search.tasks", [TASKS[1]]) == [TASKS[1]]
    with pytest.raises(InputError, match=f"search.tasks: {TASKS[2]} has no exact match"):
        match.tasks(inputs.workspace, "search.tasks", TASKS)
    with pytest.raises(InputError, match=r"search.tasks: 'singing' is no task; the tasks are "):
        match.tasks(inputs.workspace, "search.tasks", ["singing"])


def test_the_loss_of_a_language_model(inputs: LearningInputs):
    workspace, candidates = inputs.workspace, Candidates(inputs, 1)
    loss = task_score(None, workspace, "search")
    score = on_validation_data(loss, workspace, loss.tasks(workspace, "search.score"))
    measured = score.measure(candidates, np.full(3, 0.4))
    row = workspace.evaluator.row(
        "", candidates.parameters(np.full(3, 0.4)), workspace.data.validation
    )
    assert measured == row.tasks and not score.maximise
    assert score.signed(2.0) == -2.0 and score.signed(np.nan) == -np.inf


def test_accuracy_of_a_language_model(inputs: LearningInputs):
    with pytest.raises(InputError, match=r"search.score: accuracy is of classes"):
        task_score("accuracy", inputs.workspace, "search")


def test_answers_of_classifiers(image_recipe: dict[str, Any]):
    for task in image_recipe["tasks"].values():
        task["validation"] = task["test"]
    workspace = open_workspace(parse_recipe(image_recipe), Path())
    with pytest.raises(InputError, match=r"front.score: exact_match is of answers"):
        task_score("exact_match", workspace, "front")
