"""Merges from calibration data: what methods are given of language models."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.methods import average, featcal, fisher, merged_parameters, regmean
from adamerge_jax.methods.experts import expert_parameters
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.pipeline.merge import method_parameters, open_statistics
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import TEXTS, VOCABULARY, byte_tokenizer, give_data, save_models

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two experts of a language model; the last batch of each task's seven texts is not full."""
    root = tmp_path_factory.mktemp("language")
    fields = save_models(root, LlamaForCausalLM(LlamaConfig(**SIZES)), byte_tokenizer())
    tasks = list(fields["tasks"])[:2]
    rows = {task: [{"text": text} for text in TEXTS[k : k + 7]] for k, task in enumerate(tasks)}
    recipe = give_data(fields, root, rows) | {"evaluation": {"batch_size": 5}}
    return open_workspace(parse_recipe(recipe), Path("/"))


def test_the_loss_is_that_of_every_text_once(workspace: Workspace):
    deltas = load_task_vectors(workspace.models, None)[0]
    parameters = expert_parameters(workspace.base(), deltas, 2, 1)
    statistics = open_statistics(workspace)
    for position, (task, examples) in enumerate(workspace.data.calibration.items()):
        scores = workspace.evaluator.example_scores(parameters, task, examples)
        expected = np.mean(scores.values / scores.counts)
        np.testing.assert_allclose(statistics.loss(position, parameters), expected, rtol=1e-5)


def test_the_output_layer_is_one_of_the_linear_layers(workspace: Workspace):
    base, lines = workspace.base(), []
    deltas = load_task_vectors(workspace.models, None)[0]
    merged = method_parameters(workspace, regmean(), base, deltas, lines.append)
    plain = merged_parameters(average(), base, deltas, 2)
    differing = {name for name in base if np.abs(merged[name] - plain[name]).max() > 1e-4}
    linear = {name for name in base if name.endswith("_proj.weight")}
    assert differing == linear | {"lm_head.weight"}
    assert lines[-1].startswith("100%, 0:00 left")


def test_a_kept_layer_of_a_stack_stays_as_in_the_base(workspace: Workspace):
    kept = {name for name in workspace.models.base.names if ".layers.0." in name}
    models = dataclasses.replace(workspace.models, kept_from_base=frozenset(kept))
    base, deltas = workspace.base(), load_task_vectors(models, None)[0]
    merged = method_parameters(workspace._replace(models=models), featcal(), base, deltas)
    for name in (name for name in deltas if is_stacked(name)):
        np.testing.assert_array_equal(merged[name][0], base[name][0])
    name = "model.layers.*.mlp.up_proj.weight"
    assert np.abs(merged[name][1] - base[name][1]).max() > 1e-4


def test_fisher_merging_weighs_all_parameters(workspace: Workspace):
    base = workspace.base()
    deltas = load_task_vectors(workspace.models, None)[0]
    merged = method_parameters(workspace, fisher(), base, deltas)
    plain = merged_parameters(average(), base, deltas, 2)
    assert all(np.isfinite(values).all() for values in merged.values())
    differing = {name for name in base if np.abs(merged[name] - plain[name]).max() > 1e-4}
    assert differing == deltas.keys()
    rows = np.abs(merged["model.embed_tokens.weight"] - plain["model.embed_tokens.weight"]).max(-1)
    assert 0 < (rows > 0).sum() < VOCABULARY  # the others are in no text, and averaged
