import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div

from adamerge_jax.errors import InputError
from adamerge_jax.objectives import (
    NOT_PREDICTED,
    Objective,
    Targets,
    TargetSpec,
    TaskOutputs,
    TopTokens,
    entropy,
    make_objective,
    require_given,
    token_losses,
    weighted_sum,
)
from adamerge_jax.registry import allow_code

LABELS = np.array([0, 4, 2, 2, 1, 3])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1] * 4, [1, 0, 1, 0]])


def draw(seed: int, spread: float = 1.0, shape: tuple[int, ...] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * spread


def require_same(found, logits: np.ndarray, reference, atol: float = 2e-6) -> None:
    """Values and gradients of `found(logits)` in JAX and `reference(logits)` in PyTorch."""
    leaf = torch.tensor(logits, requires_grad=True)
    expected = reference(leaf)
    expected.sum().backward()
    values, pull_back = jax.vjp(jax.jit(found), jnp.asarray(logits))
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=atol)
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
    # A small KL is a difference of larger terms, and the temperature scales their rounding too.
    require_same(
        lambda x: objective.value(TaskOutputs(x), targets),
        draw(0, spread),
        reference,
        atol=2e-6 * (max(1, temperature**2) if form == "kl" else 1),
    )
    assert (
        objective.target_spec == TargetSpec(expert_logits=True, top_tokens=64, prompts=True)
        and objective.target_spec.expert
    )


@pytest.mark.parametrize("form", ["soft", "kl"])
def test_alignment_is_lowest_where_the_expert_is(form):
    objective = make_objective("logit_alignment", {"form": form})
    targets = Targets(expert_logits=jnp.asarray(draw(1)))
    at_expert = objective.value(TaskOutputs(jnp.asarray(draw(1) + 7.0)), targets)
    own = entropy().value(TaskOutputs(targets.expert_logits), Targets())
    np.testing.assert_allclose(at_expert, own if form == "soft" else 0 * own, rtol=1e-5, atol=1e-6)
    away = objective.value(TaskOutputs(jnp.asarray(draw(2))), targets)
    assert (away > at_expert).all()


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
    assert (
        objective.target_spec == TargetSpec(hidden_states=tuple(layers), whole_batch=relative)
        and objective.target_spec.expert
    )


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_cross_entropy(spread):
    objective = make_objective("cross_entropy", {})
    require_same(
        lambda x: objective.value(TaskOutputs(x), Targets(labels=LABELS)),
        draw(0, spread),
        lambda x: torch_cross_entropy(x, torch.tensor(LABELS), reduction="none"),
    )
    assert objective.target_spec == TargetSpec(labels=True) and not objective.target_spec.expert


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.95, 1.0])
def test_pseudo_labels(threshold):
    objective = make_objective("pseudo_labels", {"threshold": threshold})
    weak = draw(3, 2.0)
    plain = torch.tensor(weak)

    def reference(augmented):
        confidence, label = plain.softmax(-1).max(-1)
        bar = min(threshold, confidence.mean().item())
        rows = [
            torch_cross_entropy(augmented[i : i + 1], label[i : i + 1])
            if confidence[i] >= bar
            else 0
            for i in range(6)
        ]
        # The mean over the task's examples is that over those that count.
        counted = int((confidence >= bar).sum())
        return torch.stack([torch.as_tensor(row) * 6 / counted for row in rows])

    def found(augmented, weak=weak):
        return objective.value(
            TaskOutputs(jnp.asarray(weak), augmented_logits=augmented), Targets()
        )

    require_same(found, draw(4), reference)
    if threshold in (0.95, 1.0):
        assert 0 < (np.asarray(found(draw(4))) == 0).sum() < 6
    # No gradient through what gives the pseudo-labels.
    gradient = jax.grad(lambda weak: found(jnp.asarray(draw(4)), weak).sum())(weak)
    np.testing.assert_array_equal(gradient, 0)
    assert objective.target_spec == TargetSpec(augmented=True, whole_batch=True)


def test_equally_sure_examples_all_count():
    same = jnp.asarray(np.tile([0.1, 0.9, 0.3], (7, 1)), jnp.float32)
    outputs = TaskOutputs(same, augmented_logits=same)
    values = make_objective("pseudo_labels", {}).value(outputs, Targets())
    assert np.isfinite(values).all() and values.sum() > 0


# Other positions count in every example; in the last one none does.
TOKEN_LABELS = np.array(
    [
        [NOT_PREDICTED, 3, 0, 6],
        [1, 1, 1, NOT_PREDICTED],
        [NOT_PREDICTED, NOT_PREDICTED, NOT_PREDICTED, 2],
        [5, 0, 4, 6],
        [2, NOT_PREDICTED, NOT_PREDICTED, 5],
        [NOT_PREDICTED, NOT_PREDICTED, NOT_PREDICTED, NOT_PREDICTED],
    ]
)
VOCABULARY = 7


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_over_tokens(values: np.ndarray) -> np.ndarray:
    """The mean of each example's `[T]` values over the positions that count; 0 where none does."""
    means = []
    for own, labels in zip(values, TOKEN_LABELS, strict=True):
        chosen = [value for value, label in zip(own, labels, strict=True) if label >= 0]
        means.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return np.array(means)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("entropy", {}),
        ("cross_entropy", {}),
        ("logit_alignment", {}),
        ("logit_alignment", {"temperature": 2.0}),
        ("logit_alignment", {"form": "kl"}),
        ("logit_alignment", {"form": "hard"}),
    ],
)
def test_means_over_the_tokens_that_count(name, options, spread):
    logits = draw(0, spread, (6, 4, VOCABULARY))
    expert = draw(1, spread + 0.5, (6, 4, VOCABULARY))
    temperature = options.get("temperature", 1.0)
    ours, theirs = log_softmax(logits / temperature), log_softmax(expert / temperature)
    if name == "entropy":
        values = -(np.exp(ours) * ours).sum(-1)
    elif name == "cross_entropy":
        values = -np.take_along_axis(ours, np.maximum(TOKEN_LABELS, 0)[..., None], -1)[..., 0]
    elif options.get("form") == "hard":
        values = -np.take_along_axis(ours, expert.argmax(-1)[..., None], -1)[..., 0]
    else:
        values = -(np.exp(theirs) * ours).sum(-1)
        if options.get("form") == "kl":
            values += (np.exp(theirs) * theirs).sum(-1)
        values *= temperature**2
    objective = make_objective(name, options)
    targets = Targets(jnp.asarray(expert), labels=jnp.asarray(TOKEN_LABELS))
    found = objective.value(TaskOutputs(jnp.asarray(logits)), targets)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, mean_over_tokens(values), rtol=1e-5, atol=1e-5)
    # What does not count changes nothing, and is not learned from.
    gradient = jax.grad(lambda x: objective.value(TaskOutputs(x), targets).sum())(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[TOKEN_LABELS == NOT_PREDICTED], 0)
    if spread and name != "entropy":
        assert np.abs(gradient[TOKEN_LABELS != NOT_PREDICTED]).max(-1).all()


def top_tokens(expert: np.ndarray, count: int) -> TopTokens:
    """The likeliest tokens of an expert."""
    values, tokens = jax.lax.top_k(jax.nn.log_softmax(jnp.asarray(expert)), count)
    return TopTokens(tokens, values)


@pytest.mark.parametrize("form", ["soft", "kl"])
@pytest.mark.parametrize("count", [1, 3, VOCABULARY])
def test_likely_tokens_and_the_rest_as_one(form, count):
    logits, expert = draw(0, 1.0, (6, 4, VOCABULARY)), draw(1, 1.5, (6, 4, VOCABULARY))
    ours, theirs = np.exp(log_softmax(logits)), np.exp(log_softmax(expert))
    values = np.zeros((6, 4))
    for place in np.ndindex(6, 4):
        likely = np.argsort(-theirs[place])[:count]
        p, q = ([*each[place][likely], 1 - each[place][likely].sum()] for each in (theirs, ours))
        for wanted, own in zip(p, q, strict=True):
            if wanted > 1e-12:
                values[place] -= wanted * np.log(own)
                values[place] += wanted * np.log(wanted) if form == "kl" else 0.0
    objective = make_objective("logit_alignment", {"form": form, "top_tokens": count, "prompts": 0})
    assert objective.target_spec == TargetSpec(expert_logits=True, top_tokens=count)
    labels = jnp.asarray(TOKEN_LABELS)
    targets = Targets(labels=labels, expert_top=top_tokens(expert, count))
    found = objective.value(TaskOutputs(jnp.asarray(logits)), targets)
    # The rest is 1 less a sum in float32.
    np.testing.assert_allclose(found, mean_over_tokens(values), rtol=2e-5, atol=2e-5)
    if count == VOCABULARY:
        full = make_objective("logit_alignment", {"form": form})
        all_of_them = Targets(jnp.asarray(expert), labels=labels)
        expected = full.value(TaskOutputs(jnp.asarray(logits)), all_of_them)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["soft", "kl", "hard"])
@pytest.mark.parametrize("count", [None, 3])
def test_the_tokens_of_prompts_count_while_coefficients_are_learned(form, count):
    logits, expert = draw(0, 1.0, (6, 4, VOCABULARY)), draw(1, 1.5, (6, 4, VOCABULARY))
    prompts = np.random.default_rng(2).random((6, 4)) < 0.5
    prompts[3] = False
    options = {"form": form, "top_tokens": count}
    objective = make_objective("logit_alignment", options | {"prompts": 0.7})
    given = {"labels": jnp.asarray(TOKEN_LABELS)}
    if count is None:
        given["expert_logits"] = jnp.asarray(expert)
    else:
        given["expert_top"] = top_tokens(expert, count)
    outputs = TaskOutputs(jnp.asarray(logits))
    held_out = Targets(**given)
    responses = make_objective("logit_alignment", options | {"prompts": 0})
    np.testing.assert_array_equal(
        objective.value(outputs, held_out), responses.value(outputs, held_out)
    )
    # The same values where prompts are what is to be predicted.
    as_labels = jnp.where(prompts, 0, NOT_PREDICTED)
    swapped = held_out._replace(labels=as_labels)
    learning = held_out._replace(prompts=jnp.asarray(prompts))
    expected = responses.value(outputs, held_out) + 0.7 * responses.value(outputs, swapped)
    np.testing.assert_allclose(objective.value(outputs, learning), expected, rtol=1e-6)
    differs = np.asarray(expected != responses.value(outputs, held_out))
    assert differs.tolist() == prompts.any(1).tolist()
    if objective.floor is not None:
        expected = responses.floor(held_out) + 0.7 * responses.floor(swapped)
        np.testing.assert_allclose(objective.floor(learning), expected, rtol=1e-6)


def test_the_class_of_an_expert_is_a_token_and_never_the_rest():
    # Ten tokens of equal probability but for one: all others together are far likelier.
    expert = np.zeros((1, 1, 10), np.float32)
    expert[..., 4] = 0.5
    logits = draw(0, 1.0, (1, 1, 10))
    objective = make_objective("logit_alignment", {"form": "hard", "top_tokens": 2})
    targets = Targets(labels=jnp.array([[7]]), expert_top=top_tokens(expert, 2))
    found = objective.value(TaskOutputs(jnp.asarray(logits)), targets)
    np.testing.assert_allclose(found, [-log_softmax(logits)[0, 0, 4]], rtol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_small_rest_is_not_rounded_to_nothing(gap, temperature):
    """Values and gradients are those of float64, however sure the merged model is."""
    logits = draw(0, 1.0, (6, 4, VOCABULARY))
    expert = draw(1, 1.5, (6, 4, VOCABULARY))
    top = top_tokens(expert, 3)
    tokens = np.asarray(top.tokens)
    sure = np.take_along_axis(logits, tokens, -1) + np.float32(gap)
    np.put_along_axis(logits, tokens, sure, -1)
    stored = np.exp(np.asarray(top.log_probabilities, np.float64))
    wanted = np.concatenate([stored, 1 - stored.sum(-1, keepdims=True)], -1) ** (1 / temperature)
    wanted /= wanted.sum(-1, keepdims=True)

    def reference(x):
        likely = torch.gather(x, -1, torch.tensor(tokens))
        others = x.scatter(-1, torch.tensor(tokens), -torch.inf).logsumexp(-1, keepdim=True)
        own = (torch.cat([likely, others], -1) / temperature).log_softmax(-1)
        losses = -(temperature**2) * (torch.tensor(wanted) * own).sum(-1)
        counts = torch.tensor(TOKEN_LABELS != NOT_PREDICTED)
        return (losses * counts).sum(-1) / counts.sum(-1).clamp(min=1)

    leaf = torch.tensor(logits.astype(np.float64), requires_grad=True)
    expected = reference(leaf)
    expected.sum().backward()
    objective = make_objective("logit_alignment", {"top_tokens": 3, "temperature": temperature})
    targets = Targets(labels=jnp.asarray(TOKEN_LABELS), expert_top=top)
    values, pull_back = jax.vjp(
        jax.jit(lambda x: objective.value(TaskOutputs(x), targets)), jnp.asarray(logits)
    )
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull_back(jnp.ones(6))[0], leaf.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("of_expert", [1.0, 200.0])
@pytest.mark.parametrize("of_model", [1.0, 200.0])
def test_nothing_is_left_for_the_rest(of_expert, of_model):
    """Probabilities that sum up to 1, or a little over it, leave no rest to take a logarithm of."""
    logits, expert = (
        draw(seed, spread, (6, 4, VOCABULARY)) for seed, spread in ((0, of_model), (1, of_expert))
    )
    labels = jnp.asarray(TOKEN_LABELS)
    for count in (2, VOCABULARY):
        objective = make_objective("logit_alignment", {"top_tokens": count})
        targets = Targets(labels=labels, expert_top=top_tokens(expert, count))
        value, gradient = jax.value_and_grad(
            lambda x, objective=objective, targets=targets: objective.value(
                TaskOutputs(x), targets
            ).sum()
        )(jnp.asarray(logits))
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
def test_token_losses(spread):
    logits = draw(0, spread, (6, 4, VOCABULARY))
    expected = torch_cross_entropy(
        torch.tensor(logits).transpose(1, 2),
        torch.tensor(TOKEN_LABELS),
        ignore_index=NOT_PREDICTED,
        reduction="none",
    )
    losses = token_losses(jnp.asarray(logits), jnp.asarray(TOKEN_LABELS))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(losses)[TOKEN_LABELS == NOT_PREDICTED] == 0).all()
    half = token_losses(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(TOKEN_LABELS))
    assert half.dtype == jnp.float32
    classes = token_losses(jnp.asarray(logits[:, 0]), jnp.asarray(LABELS))
    wanted = torch_cross_entropy(torch.tensor(logits[:, 0]), torch.tensor(LABELS), reduction="none")
    np.testing.assert_allclose(classes, wanted, rtol=1e-5, atol=1e-6)


def test_most_top_tokens_that_a_term_asks_for():
    def asked(*counts: int | None) -> int | None:
        terms = [("logit_alignment", {"top_tokens": count}) for count in counts]
        return weighted_sum([(1.0, make_objective(*term)) for term in terms]).target_spec.top_tokens

    assert asked(8) == 8
    assert asked(8, 3) == 8
    # Some term needs all logits: they are kept once.
    assert asked(8, None) is None
    terms = [("logit_alignment", {"top_tokens": 4}), ("entropy", {}), ("cross_entropy", {})]
    assert weighted_sum([(1.0, make_objective(*term)) for term in terms]).target_spec == TargetSpec(
        expert_logits=True, labels=True, top_tokens=4, prompts=True
    )


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
        ("expert_labels", {}),
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


def test_expert_labels():
    """The authors' choice of examples and their mean, written in PyTorch."""
    merged, expert = draw(0, 2.0, (12, 4)), draw(1, 2.0, (12, 4))
    own, teacher = torch.tensor(merged, requires_grad=True), torch.tensor(expert)
    sure, label = teacher.softmax(-1).max(-1)
    own_sure, own_label = own.softmax(-1).max(-1)
    chosen = (label == own_label) | (sure >= own_sure)
    assert 0 < chosen.sum() < 12 and (label != own_label)[chosen].any()
    expected = torch_cross_entropy(own[chosen], label[chosen])
    expected.backward()
    targets = Targets(expert_logits=jnp.asarray(expert))

    def mean(logits):
        return make_objective("expert_labels", {}).value(TaskOutputs(logits), targets).mean()

    found, gradient = jax.value_and_grad(mean)(jnp.asarray(merged))
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, own.grad, rtol=1e-4, atol=1e-6)


def test_weighted_sum():
    outputs = TaskOutputs(jnp.asarray([[1.0, 2.0], [0.0, 3.0]]))
    first = Objective(lambda outputs, targets: outputs.logits[:, 0])
    objective = weighted_sum([(2.0, entropy()), (-0.5, first)])
    expected = 2 * entropy().value(outputs, Targets()) - jnp.array([0.5, 0.0])
    np.testing.assert_allclose(objective.value(outputs, Targets()), expected, rtol=1e-6)
    assert objective.target_spec == TargetSpec() and not objective.target_spec.expert
    nothing = weighted_sum([])
    np.testing.assert_array_equal(nothing.value(outputs, Targets()), [0, 0])


def test_a_weighted_sum_needs_what_its_terms_need():
    terms = [
        (1.0, make_objective("hidden_state_alignment", {"layers": [3, 1]})),
        (1.0, make_objective("hidden_state_alignment", {"layers": [1, -1]})),
        (-1.0, make_objective("cross_entropy", {})),
    ]
    needs = weighted_sum(terms).target_spec
    assert needs == TargetSpec(labels=True, hidden_states=(-1, 1, 3)) and needs.expert
    more = [("logit_alignment", {}), ("pseudo_labels", {})]
    terms += [(1.0, make_objective(*term)) for term in more]
    assert weighted_sum(terms).target_spec == TargetSpec(
        True, True, True, (-1, 1, 3), top_tokens=64, whole_batch=True, prompts=True
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("entropi", {}, "expected one of entropy, .*nearest is 'entropy'"),
        ("entropy", {"temperature": 2}, "entropy says: .*'temperature'; its options are none"),
        ("logit_alignment", {"temperature": 0}, "temperature is 0, expected over 0"),
        ("logit_alignment", {"temperature": "hot"}, "logit_alignment says: "),
        ("logit_alignment", {"form": "firm"}, "form is 'firm', expected 'soft', 'kl' or 'hard'"),
        (
            "logit_alignment",
            {"cross_task_examples": 0},
            "cross_task_examples is 0, expected from 1",
        ),
        ("logit_alignment", {"top_tokens": 0}, "top_tokens is 0, expected from 1"),
        ("logit_alignment", {"prompts": -1}, "prompts is -1, expected from 0"),
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
    allow_code([name])
    with pytest.raises(InputError, match=f"^objectives: .*{message}") as caught:
        make_objective(name, options)
    assert "\n" not in str(caught.value)


def test_ones_own_objective(tmp_path, monkeypatch):
    (tmp_path / "own_objectives.py").write_text(
        "from adamerge_jax import extension\n"
        "from adamerge_jax.objectives import TargetSpec, Objective\n"
        "@extension\n"
        "def largest(scale=1.0):\n"
        "    value = lambda outputs, targets: scale * outputs.logits.max(-1)\n"
        "    return Objective(value, TargetSpec(labels=True))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["own_objectives:largest"])
    objective = make_objective("own_objectives:largest", {"scale": 2.0})
    assert objective.target_spec.labels
    values = objective.value(TaskOutputs(jnp.asarray(draw(0))), Targets())
    np.testing.assert_allclose(values, 2 * draw(0).max(-1))
    with pytest.raises(InputError, match="its options are scale"):
        make_objective("own_objectives:largest", {"size": 2.0})


@pytest.mark.parametrize(
    ("name", "options", "targets", "missing"),
    [
        ("logit_alignment", {}, Targets(), "the expert's logits in the targets; ask_expert"),
        ("cross_entropy", {}, Targets(), "labels in the targets"),
        ("pseudo_labels", {}, Targets(), "the logits of a strong view"),
        ("hidden_state_alignment", {"layers": [0]}, Targets(), "expert's hidden states in the"),
        (
            "hidden_state_alignment",
            {"layers": [0]},
            Targets(expert_hidden_states={0: np.zeros((6, 2, 3))}),
            "hidden states in the outputs",
        ),
    ],
)
def test_what_an_objective_was_not_given(name, options, targets, missing):
    with pytest.raises(InputError, match=missing):
        require_given(make_objective(name, options).target_spec, TaskOutputs(draw(0)), targets)


def test_old_names_warn_and_work():
    with pytest.warns(DeprecationWarning, match="Needs is now TargetSpec"):
        from adamerge_jax.objectives import Needs
    old = Needs(labels=True, strong_view=True, elsewhere=5)
    assert old == TargetSpec(labels=True, augmented=True, cross_task=5)
    with pytest.warns(DeprecationWarning, match="needs is now target_spec"):
        objective = Objective(lambda outputs, targets: outputs.logits[:, 0], needs=old)
    assert objective.target_spec == old
    with pytest.warns(DeprecationWarning, match="needs is now target_spec"):
        assert objective.needs == old
    with pytest.warns(DeprecationWarning, match="now cross_task and cross_task_examples"):
        objective = make_objective("logit_alignment", {"elsewhere": 0.5, "elsewhere_examples": 7})
    new = make_objective("logit_alignment", {"cross_task": 0.5, "cross_task_examples": 7})
    assert objective.target_spec == new.target_spec and new.target_spec.cross_task == 7
    with pytest.warns(DeprecationWarning, match="now augmented_logits"):
        assert TaskOutputs(draw(0), augmented_logits=1).strong == 1
