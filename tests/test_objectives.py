import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div

from adamerge_jax.errors import InputError
from adamerge_jax.objectives import (
    Needs,
    Objective,
    Targets,
    TaskOutputs,
    entropy,
    make_objective,
    weighted_sum,
)

LABELS = np.array([0, 4, 2, 2, 1, 3])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1] * 4, [1, 0, 1, 0]])


def draw(seed: int, spread: float = 1.0, shape: tuple[int, ...] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * spread


def require_same(found, logits: np.ndarray, reference) -> None:
    """Values and gradients of `found(logits)` in JAX and `reference(logits)` in PyTorch."""
    leaf = torch.tensor(logits, requires_grad=True)
    expected = reference(leaf)
    expected.sum().backward()
    values, pull_back = jax.vjp(jax.jit(found), jnp.asarray(logits))
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(6))[0], leaf.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
def test_entropy(spread):
    require_same(
        lambda x: make_objective("entropy", {}).value(TaskOutputs(x), Targets()),
        draw(0, spread),
        lambda x: torch.distributions.Categorical(logits=x).entropy(),
    )


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [1, 0.5, 4.0])
@pytest.mark.parametrize("form", ["soft", "kl", "hard"])
def test_logit_alignment(form, temperature, spread):
    objective = make_objective("logit_alignment", {"temperature": temperature, "form": form})
    expert = torch.tensor(draw(1, spread))

    def reference(x):
        if form == "hard":
            return torch_cross_entropy(x, expert.argmax(-1), reduction="none")
        wanted = (expert / temperature).softmax(-1)
        if form == "soft":
            return temperature**2 * torch_cross_entropy(x / temperature, wanted, reduction="none")
        merged = (x / temperature).log_softmax(-1)
        return temperature**2 * kl_div(merged, wanted, reduction="none").sum(-1)

    targets = Targets(expert_logits=jnp.asarray(expert.numpy()))
    require_same(lambda x: objective.value(TaskOutputs(x), targets), draw(0, spread), reference)
    assert objective.needs == Needs(expert_logits=True) and objective.needs.expert


@pytest.mark.parametrize("form", ["soft", "kl"])
def test_alignment_is_lowest_where_the_expert_is(form):
    objective = make_objective("logit_alignment", {"form": form})
    targets = Targets(expert_logits=jnp.asarray(draw(1)))
    at_expert = objective.value(TaskOutputs(jnp.asarray(draw(1) + 7.0)), targets)
    own = entropy().value(TaskOutputs(targets.expert_logits), Targets())
    np.testing.assert_allclose(at_expert, own if form == "soft" else 0 * own, rtol=1e-5, atol=1e-6)
    elsewhere = objective.value(TaskOutputs(jnp.asarray(draw(2))), targets)
    assert (elsewhere > at_expert).all()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("layers", [[1], [0, -1]])
@pytest.mark.parametrize("mask", [None, MASK])
def test_hidden_state_alignment(mask, layers, relative):
    options = {"layers": layers} | ({"relative": True} if relative else {})
    objective = make_objective("hidden_state_alignment", options)
    expert = {layer: draw(5 + layer, 2.0 + layer, (6, 4, 3)) for layer in layers}

    def found(x):
        outputs = TaskOutputs(x[:, 0, 0, :], {k: x[:, i] for i, k in enumerate(layers)}, mask)
        return objective.value(outputs, Targets(expert_hidden_states=expert))

    def reference(x):
        rows = []
        for example in range(6):
            shown = torch.tensor(MASK[example] == 1) if mask is not None else slice(None)
            errors = []
            for position, layer in enumerate(layers):
                error = x[example, position][shown] - torch.tensor(expert[layer][example])[shown]
                scale = 1.0
                if relative:
                    # Of the task's examples in the batch, each weighing the same.
                    scale = np.mean(
                        [
                            np.square(e[m == 1] if mask is not None else e).mean()
                            for e, m in zip(expert[layer], MASK, strict=True)
                        ]
                    )
                errors.append((error**2).mean() / float(scale))
            rows.append(sum(errors) / len(errors))
        return torch.stack(rows)

    require_same(found, draw(0, 1.0, (6, len(layers), 4, 3)), reference)
    assert objective.needs == Needs(hidden_states=tuple(layers)) and objective.needs.expert


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_cross_entropy(spread):
    objective = make_objective("cross_entropy", {})
    require_same(
        lambda x: objective.value(TaskOutputs(x), Targets(labels=LABELS)),
        draw(0, spread),
        lambda x: torch_cross_entropy(x, torch.tensor(LABELS), reduction="none"),
    )
    assert objective.needs == Needs(labels=True) and not objective.needs.expert


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.95, 1.0])
def test_pseudo_labels(threshold):
    objective = make_objective("pseudo_labels", {"threshold": threshold})
    weak = draw(3, 2.0)
    plain = torch.tensor(weak)

    def reference(strong):
        confidence, label = plain.softmax(-1).max(-1)
        bar = min(threshold, confidence.mean().item())
        rows = [
            torch_cross_entropy(strong[i : i + 1], label[i : i + 1]) if confidence[i] >= bar else 0
            for i in range(6)
        ]
        # The mean over the task's examples is that over those that count.
        counted = int((confidence >= bar).sum())
        return torch.stack([torch.as_tensor(row) * 6 / counted for row in rows])

    def found(strong, weak=weak):
        return objective.value(TaskOutputs(jnp.asarray(weak), strong=strong), Targets())

    require_same(found, draw(4), reference)
    if threshold in (0.95, 1.0):
        assert 0 < (np.asarray(found(draw(4))) == 0).sum() < 6
    # No gradient through what gives the pseudo-labels.
    gradient = jax.grad(lambda weak: found(jnp.asarray(draw(4)), weak).sum())(weak)
    np.testing.assert_array_equal(gradient, 0)
    assert objective.needs == Needs(strong_view=True)


def test_equally_sure_examples_all_count():
    same = jnp.asarray(np.tile([0.1, 0.9, 0.3], (7, 1)), jnp.float32)
    outputs = TaskOutputs(same, strong=same)
    values = make_objective("pseudo_labels", {}).value(outputs, Targets())
    assert np.isfinite(values).all() and values.sum() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("entropy", {}),
        ("logit_alignment", {"temperature": 2.0}),
        ("logit_alignment", {"form": "kl"}),
        ("logit_alignment", {"form": "hard"}),
        ("hidden_state_alignment", {"layers": [1]}),
        ("cross_entropy", {}),
        ("pseudo_labels", {}),
    ],
)
def test_half_precision_is_computed_in_float32(name, options):
    def value(dtype):
        def array(seed, *shape):
            return jnp.asarray(draw(seed, 1.0, shape), jnp.bfloat16).astype(dtype)

        outputs = TaskOutputs(array(0, 6, 5), {1: array(1, 6, 4, 3)}, MASK, array(2, 6, 5))
        targets = Targets(array(3, 6, 5), {1: array(4, 6, 4, 3)}, LABELS)
        return make_objective(name, options).value(outputs, targets)

    values = value(jnp.bfloat16)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, value(jnp.float32), rtol=1e-6)


def test_weighted_sum():
    outputs = TaskOutputs(jnp.asarray([[1.0, 2.0], [0.0, 3.0]]))
    first = Objective(lambda outputs, targets: outputs.logits[:, 0])
    objective = weighted_sum([(2.0, entropy()), (-0.5, first)])
    expected = 2 * entropy().value(outputs, Targets()) - jnp.array([0.5, 0.0])
    np.testing.assert_allclose(objective.value(outputs, Targets()), expected, rtol=1e-6)
    assert objective.needs == Needs() and not objective.needs.expert
    nothing = weighted_sum([])
    np.testing.assert_array_equal(nothing.value(outputs, Targets()), [0, 0])


def test_a_weighted_sum_needs_what_its_terms_need():
    terms = [
        (1.0, make_objective("hidden_state_alignment", {"layers": [3, 1]})),
        (1.0, make_objective("hidden_state_alignment", {"layers": [1, -1]})),
        (-1.0, make_objective("cross_entropy", {})),
    ]
    needs = weighted_sum(terms).needs
    assert needs == Needs(labels=True, hidden_states=(-1, 1, 3)) and needs.expert
    more = [("logit_alignment", {}), ("pseudo_labels", {})]
    terms += [(1.0, make_objective(*term)) for term in more]
    assert weighted_sum(terms).needs == Needs(True, True, True, (-1, 1, 3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("entropi", {}, "expected one of entropy, .*nearest is 'entropy'"),
        ("entropy", {"temperature": 2}, "entropy says: .*'temperature'; its options are none"),
        ("logit_alignment", {"temperature": 0}, "temperature is 0, expected over 0"),
        ("logit_alignment", {"temperature": "hot"}, "logit_alignment says: "),
        ("logit_alignment", {"form": "firm"}, "form is 'firm', expected 'soft', 'kl' or 'hard'"),
        ("hidden_state_alignment", {}, "'layers'; its options are layers, relative"),
        ("hidden_state_alignment", {"layers": []}, "expected a list of numbers"),
        ("hidden_state_alignment", {"layers": 3}, "hidden_state_alignment says: "),
        ("hidden_state_alignment", {"layers": ["last"]}, "expected a list of numbers"),
        ("pseudo_labels", {"threshold": 1.5}, "threshold is 1.5, expected from 0 to 1"),
        ("no_such_module:nothing", {}, "cannot be imported"),
        ("adamerge_jax.objectives:nothing", {}, "cannot be imported"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=f"^objectives: .*{message}") as caught:
        make_objective(name, options)
    assert "\n" not in str(caught.value)


def test_ones_own_objective(tmp_path, monkeypatch):
    (tmp_path / "own_objectives.py").write_text(
        "from adamerge_jax.objectives import Needs, Objective\n"
        "def largest(scale=1.0):\n"
        "    value = lambda outputs, targets: scale * outputs.logits.max(-1)\n"
        "    return Objective(value, Needs(labels=True))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objective = make_objective("own_objectives:largest", {"scale": 2.0})
    assert objective.needs.labels
    values = objective.value(TaskOutputs(jnp.asarray(draw(0))), Targets())
    np.testing.assert_allclose(values, 2 * draw(0).max(-1))
    with pytest.raises(InputError, match="its options are scale"):
        make_objective("own_objectives:largest", {"size": 2.0})
