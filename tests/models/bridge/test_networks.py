"""Networks that run a model's PyTorch forward, against PyTorch itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.bert.modeling_bert import BertOutput

from adamerge_jax.mixing import mix
from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.task_vectors import DenseDelta
from tests.models.bridge.tiny import Square, gradient, tiny, tiny_language_model

ARCHITECTURES = ("bert", "deberta-v2", "modernbert", "resnet", "xlm")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_states_and_gradient_are_pytorchs(name):
    require_same(name)


def test_gradients_stop_and_pass_within_a_layer_as_pytorchs_do(monkeypatch):
    """Under `torch.no_grad()`, and in a function with a backward of its own, which Bloom has."""
    forward = BertOutput.forward

    def changed(layer, states, residual):
        with torch.no_grad():
            stopped = torch.tanh(states)
        return forward(layer, Square.apply(states) + stopped, residual)

    monkeypatch.setattr(BertOutput, "forward", changed)
    require_same("bert")


def require_same(name: str) -> None:
    """Compares a tiny model's logits, hidden states and gradients with PyTorch's."""
    case = tiny(name)
    config = case.model.config
    family = bridged_family(config, type(case.model).__name__)
    backbone, head = family.build_backbone(config), family.build_head(config)
    everything = {n: v.float().numpy() for n, v in case.model.state_dict().items()}
    base = {n: jnp.asarray(everything[n]) for n in backbone.shapes}
    heads = {n: jnp.asarray(everything[n]) for n in head.shapes}
    assert not base.keys() & heads.keys()
    deltas = {n: DenseDelta(jnp.asarray(d.float().numpy())) for n, d in case.deltas.items()}
    coefficients = {n: jnp.array([0.3, 0.6], jnp.float32) for n in deltas}
    weights = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    has_states = name != "resnet"

    @jax.jit
    def run(coefficients, base, deltas, heads, inputs):
        def total(coefficients):
            scales = {n: c.reshape(2, *(1 for _ in base[n].shape)) for n, c in coefficients.items()}
            outputs = backbone(mix(base, deltas, scales), inputs, hidden_states=has_states)
            logits = head(heads, outputs)
            return (logits * weights).sum(), (logits, outputs.hidden_states)

        return jax.grad(total, has_aux=True)(coefficients)

    gradients, (logits, states) = run(coefficients, base, deltas, heads, case.inputs)

    scales = {n: torch.tensor([0.3, 0.6], dtype=torch.float64) for n in deltas}
    with torch.no_grad():
        expected = case.run(case.merged(scales), output_hidden_states=True)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-5, rtol=1e-5)
    if has_states:
        for state, expected_state in zip(states, expected.hidden_states, strict=True):
            np.testing.assert_allclose(state, expected_state.numpy(), atol=1e-4)
    expected_gradients = gradient(
        lambda leaves: (case.run(case.merged(leaves)).logits * torch.from_numpy(weights)).sum(),
        scales,
    )
    largest = max(np.abs(g).max() for g in expected_gradients.values())
    assert largest > 1e-3
    for parameter, of_parameter in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[parameter], of_parameter, atol=1e-5 * largest, err_msg=parameter
        )


@pytest.mark.parametrize("name", ["gpt2", "qwen3-moe", "bart"])
def test_a_language_models_logits_are_transformers(name):
    model, inputs = tiny_language_model(name)
    family = bridged_family(model.config, type(model).__name__)
    backbone, head = family.build_backbone(model.config), family.build_head(model.config)
    tables = {"gpt2": ("transformer.wte.weight",), "bart": ("model.shared.weight",)}
    tied = tables.get(name, ())
    assert family.language and family.tied(model.config) == tied
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    parameters = {n: saved[n].numpy() for n in backbone.shapes}
    if name == "qwen3-moe":  # each expert by its own name, as in a checkpoint
        assert "model.layers.1.mlp.experts.3.gate_proj.weight" in parameters

    @jax.jit
    def run(parameters, inputs):
        outputs = backbone(parameters, inputs, hidden_states=True)
        return head(complete_head(head, {}, parameters), outputs), outputs.hidden_states

    given = {n: torch.from_numpy(a.copy()).long() for n, a in inputs.items()}
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True)
    tokens = inputs["attention_mask"] == 1
    logits, states = run(parameters, inputs)
    np.testing.assert_allclose(logits[tokens], expected.logits.numpy()[tokens], atol=1e-4)
    expected_states = expected.get("hidden_states") or expected.decoder_hidden_states
    last = expected_states[-1].numpy()
    np.testing.assert_allclose(states[-1][tokens], last[tokens], atol=1e-4)
