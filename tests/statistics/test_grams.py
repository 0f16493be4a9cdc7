"""Gram matrices against the inputs that `transformers` gives its linear layers, without padding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.parameter_names import is_stacked, tensors_of
from adamerge_jax.statistics import CalibrationBatch, Statistics, TaskData
from tests.references import VIT, parameters_of, randomise, saved_parameters

LENGTHS = (7, 4, 6)
"""Tokens of each example; the rest of its row is padding."""

TEXT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
DECODER = dict(TEXT, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=16)
T5 = dict(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "BertForSequenceClassification",
        dict(TEXT, intermediate_size=24, max_position_embeddings=16),
    ),
    "llama": ("LlamaForCausalLM", DECODER),
    "llama tied": ("LlamaForCausalLM", dict(DECODER, tie_word_embeddings=True)),
    "vit": ("ViTForImageClassification", VIT),
    "t5": (
        "T5ForConditionalGeneration",
        dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def batch_of(name: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    if name == "vit":
        return {"pixel_values": generator.normal(size=(3, 3, 8, 8)).astype(np.float32)}
    ids = generator.integers(1, 40, (3, max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    batch = {"input_ids": ids.astype(np.int32), "attention_mask": mask}
    if name == "t5":  # as long as the encoder's, but padded elsewhere
        batch["decoder_input_ids"] = batch["input_ids"][::-1].copy()
        batch["decoder_attention_mask"] = mask[::-1].copy()
    return batch


def inputs_of_layers(model: PreTrainedModel, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inputs `[B, ..., n]` of every linear layer by the name of its module."""
    seen = {}

    def hook(name: str) -> Any:
        def keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
            seen[name] = inputs[0].detach().numpy()

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(name))
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    floats = {n: t.double() if t.is_floating_point() else t.long() for n, t in tensors.items()}
    with torch.no_grad():
        model.double()(**floats)
    return seen


def reference(module: str, x: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """`X^T X / N` over the rows that are no padding, in float64."""
    mask = batch.get("attention_mask")
    of_encoder = module.startswith("encoder") or module.endswith(
        ("EncDecAttention.k", "EncDecAttention.v")
    )
    if "decoder_attention_mask" in batch and not of_encoder:
        mask = batch["decoder_attention_mask"]
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and x.ndim == 3:
        rows = x[mask > 0]
    return rows.T @ rows / len(rows)


def statistics_of(name: str, folder: Path) -> tuple[Statistics, dict[str, Any], Any]:
    """The statistics of one batch, given as two whose last example does not count."""
    architecture, settings = CASES[name]
    config_class = getattr(transformers, architecture.partition("For")[0] + "Config")
    model = getattr(transformers, architecture)(config_class(**settings))
    if name == "t5":  # `transformers` ties the output layer whatever the config says
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    randomise(model)
    tensors = saved_parameters(model, folder)
    family = family_of(model.config)
    backbone = family.build_backbone(model.config, "nothing")
    head = family.build_head(model.config)
    parameters = jax.tree.map(jnp.asarray, parameters_of(backbone, tensors))

    def run(parameters: Any, inputs: Any) -> Any:
        outputs = backbone(parameters, inputs)
        if not family.language:
            return outputs
        return head(complete_head(head, {}, parameters), outputs)

    whole = batch_of(name)

    def batches() -> Any:
        for rows, weights in (([0, 1], [1, 1]), ([2, 0], [1, 0])):
            inputs = {key: array[rows] for key, array in whole.items()}
            yield CalibrationBatch(inputs, np.array(weights, np.float32))

    return Statistics(run, [TaskData(batches, 2, run, ())]), parameters, (model, family, whole)


@pytest.mark.parametrize("name", CASES)
def test_grams_are_those_of_what_layers_see(name: str, tmp_path: Path):
    statistics, parameters, (model, family, batch) = statistics_of(name, tmp_path)
    expected = inputs_of_layers(model, batch)
    linear = statistics.linear(parameters)
    names = {key for layer in linear.layers for key in layer.names}
    places = {key: list(range(len(parameters[key]))) if is_stacked(key) else [0] for key in names}
    grams = statistics.grams(0, parameters, places)
    compared = set()
    for key, matrices in grams.items():
        for tensor, matrix in zip(tensors_of(key, parameters[key].shape), matrices, strict=True):
            module = tensor.removesuffix(".weight")
            for old, new in family.renamed:
                module = module.replace(old, new)
            wanted = reference(module, expected[module], batch)
            np.testing.assert_allclose(matrix, wanted, atol=1e-5 * wanted.max(), err_msg=tensor)
            compared.add(module)
    left_out = {"classifier"} if not family.language else set()
    assert expected.keys() - compared == (left_out | ({"lm_head"} if "tied" in name else set()))


def test_chosen_layers_alone(tmp_path: Path):
    statistics, parameters, _ = statistics_of("llama", tmp_path)
    query, down = "model.layers.*.self_attn.q_proj.weight", "model.layers.*.mlp.down_proj.weight"
    whole = statistics.grams(0, parameters, {query: [0, 1, 2], down: [0, 1, 2]})
    some = statistics.grams(0, parameters, {query: [2, 0], down: [1]})
    np.testing.assert_array_equal(some[query], whole[query][np.array([2, 0])])
    np.testing.assert_array_equal(some[down], whole[down][1:2])


def test_sums_are_float32_in_models_of_bfloat16(tmp_path: Path):
    statistics, parameters, _ = statistics_of("vit", tmp_path)
    narrow = {name: array.astype(jnp.bfloat16) for name, array in parameters.items()}
    name = "vit.encoder.layer.*.attention.attention.query.weight"
    exact = statistics.grams(0, parameters, {name: [0]})[name]
    (matrix,) = statistics.grams(0, narrow, {name: [0]}).values()
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, exact, atol=0.02 * exact.max())
