"""What is minimised: pure functions from a task's outputs to one value per example.

An objective is a function of options that returns an `Objective`. The value of a task is the mean
over its B examples, `[B]`, the value of a step the sum over its tasks. A language model predicts a
class, the next token, at each of T positions; an example's value is the mean over those that count.
To use one of your own, pass it to `make_learner`, or name it in a recipe as
`package.module:function`.

Examples:
    >>> import jax.numpy as jnp
    >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy
    >>> outputs = TaskOutputs(logits=jnp.array([[0.0, 0.0], [9.0, -9.0]]))  # [B, C]
    >>> print(entropy().value(outputs, Targets()).round(2))  # [B], in nats
    [0.69 0.  ]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.registry import call_registered

NOT_PREDICTED = -100
"""The label of a position where no token is to be predicted, as in `transformers`."""


class TaskOutputs(NamedTuple):
    """What the merged model says about one task's examples.

    Attributes:
        logits: `[B, C]`, from the task's own head; `[B, T, V]` from a language model.
        hidden_states: `[B, T, H]` by layer (0 is the embeddings), for the layers that some
            objective asks for.
        mask: `[B, T]`, 1 where a position is no padding, or None where nothing is padded.
        strong: The logits `[B, C]` of the strong view of the examples, or None where no objective
            asks for them.
        elsewhere: The logits `[(tasks - 1) B, C]` of the task's head on the examples of all other
            tasks, or None where no objective asks for them.
    """

    logits: Float[Array, "B ... C"]
    hidden_states: Mapping[int, Float[Array, "B T H"]] = {}
    mask: Int[Array, "B T"] | None = None
    strong: Float[Array, "B C"] | None = None
    elsewhere: Float[Array, "N C"] | None = None


class TopTokens(NamedTuple):
    """What an expert says of the next token, without the unlikely ones.

    Attributes:
        tokens: `[B, T, k]`, the most likely ones, most likely first.
        log_probabilities: `[B, T, k]`, of these; the rest shares what is missing to 1.
    """

    tokens: Int[Array, "B T k"]
    log_probabilities: Float[Array, "B T k"]


class Targets(NamedTuple):
    """What a task's examples are compared with, where an objective asks for it.

    Attributes:
        expert_logits: `[B, C]` or `[B, T, V]`, what the task's own expert says, or None.
        expert_hidden_states: `[B, T, H]` by layer, the expert's own.
        labels: `[B]`, class indices, or None; `[B, T]`, the token to be predicted at each position
            or `NOT_PREDICTED`, for a language model.
        expert_elsewhere: `[(tasks - 1) B, C]`, what the task's own expert says of the examples of
            all other tasks, or None.
        elsewhere_weights: `[(tasks - 1) B]`, how much each of these counts: 0 where the expert was
            not asked.
        expert_top: The likely tokens, in place of `expert_logits`, or None.
    """

    expert_logits: Float[Array, "B ... C"] | None = None
    expert_hidden_states: Mapping[int, Float[Array, "B T H"]] = {}
    labels: Int[Array, "B ..."] | None = None
    expert_elsewhere: Float[Array, "N C"] | None = None
    elsewhere_weights: Float[Array, " N"] | None = None
    expert_top: TopTokens | None = None


class Needs(NamedTuple):
    """What an objective must be given beside the merged model's logits.

    Attributes:
        expert_logits: Whether the targets must hold the expert's logits.
        labels: Whether they must hold labels.
        strong_view: Whether the outputs must hold the logits of a strong view.
        hidden_states: Layers that outputs and targets must hold, from 0 (the embeddings) to L,
            or -1 for the last.
        elsewhere: Of how many examples of each other task outputs and targets are to hold the
            logits of the task's head while coefficients are learned.
        top_tokens: How many likely tokens of the expert stand for its logits; None for all.
        whole_batch: Whether the value of an example depends on the others in its batch, other than
            by a mean over them that is added to it.
    """

    expert_logits: bool = False
    labels: bool = False
    strong_view: bool = False
    hidden_states: tuple[int, ...] = ()
    elsewhere: int = 0
    top_tokens: int | None = None
    whole_batch: bool = False

    @property
    def expert(self) -> bool:
        """Whether an expert must be asked."""
        return self.expert_logits or bool(self.hidden_states)


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
        value: `(outputs, targets) -> one value per example [B]`.
        needs: What it must be given.
    """

    value: Callable[[TaskOutputs, Targets], Float[Array, " B"]]
    needs: Needs = Needs()


def require_given(needs: Needs, outputs: TaskOutputs, targets: Targets) -> None:
    """Refuses outputs and targets without something that an objective must be given.

    Raises:
        InputError: Says what is missing, and who makes it.
    """
    layers = set(needs.hidden_states)
    missing = {
        "the expert's logits in the targets; ask_expert makes them": needs.expert_logits
        and targets.expert_logits is None
        and targets.expert_top is None,
        "labels in the targets; give them to the examples": needs.labels and targets.labels is None,
        "the logits of a strong view in the outputs; recipes make them": needs.strong_view
        and outputs.strong is None,
        "the expert's hidden states in the targets; ask_expert makes them": not layers
        <= targets.expert_hidden_states.keys(),
        "hidden states in the outputs; the forward function returns them": not layers
        <= outputs.hidden_states.keys(),
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise InputError(f"an objective must be given {what}")


def entropy() -> Objective:
    """Shannon entropy of the predicted class distribution, in nats (AdaMerging, eq. 7).

    `-sum_c softmax(z)_c log softmax(z)_c` with z the merged model's logits.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy
        >>> outputs = TaskOutputs(jnp.array([[0.0, 0.0], [9.0, -9.0]]))  # unsure, sure
        >>> print(entropy().value(outputs, Targets()).round(2))
        [0.69 0.  ]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return _per_example(_entropy(_log_softmax(outputs.logits)), targets)

    return Objective(value)


def logit_alignment(
    temperature: float = 1.0,
    form: str = "soft",
    elsewhere: float = 0.0,
    elsewhere_examples: int = 100,
    top_tokens: int | None = 64,
) -> Objective:
    """Cross-entropy from the expert's class distribution to the merged model's, in nats.

    With z the merged model's logits, e the expert's and T the temperature:

    - `soft`: `-T^2 sum_c softmax(e / T)_c log softmax(z / T)_c` (Hinton et al., 2015).
    - `kl`: the same less the expert's own entropy, so that 0 is perfect; the same gradient.
    - `hard`: cross-entropy to the class that the expert predicts (SyMerge, Jung et al., 2026).

    Args:
        temperature: T; over 1 asks for the order of unlikely classes too.
        form: One of these three.
        elsewhere: Weight of the mean of the same over the examples of all other tasks, each times
            `H(softmax(e)) / log C`, from 0 to 1: an expert has an opinion on any example, so that
            each task is learned from the examples of all, but the surer it is of what it does not
            know the less that opinion is worth. It counts while learning, not on the held-out
            data. Language models have no heads of their tasks, so that experts would contradict
            each other: there it does not count.
        elsewhere_examples: Of how many examples of each other task, drawn at random, an expert is
            asked; they stand for all of that task.
        top_tokens: k: keep the k likeliest tokens of a language model's expert at each position,
            and what is left as the probability of one more token; None for all. Classes are always
            kept all.

    Raises:
        ValueError: An argument is outside of its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, logit_alignment
        >>> outputs = TaskOutputs(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
        >>> targets = Targets(expert_logits=jnp.array([[2.0, 0.0], [2.0, 0.0]]))
        >>> print(logit_alignment(form="kl").value(outputs, targets).round(2))
        [0.   1.52]
    """
    if form not in ("soft", "kl", "hard"):
        raise ValueError(f"form is {form!r}, expected 'soft', 'kl' or 'hard'")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected over 0")
    if elsewhere < 0:
        raise ValueError(f"elsewhere is {elsewhere}, expected from 0")
    if elsewhere_examples < 1:
        raise ValueError(f"elsewhere_examples is {elsewhere_examples}, expected from 1")
    if top_tokens is not None and top_tokens < 1:
        raise ValueError(f"top_tokens is {top_tokens}, expected from 1")

    def divergence(
        logits: Float[Array, "N ... C"], experts: Float[Array, "N ... C"]
    ) -> Float[Array, "N ..."]:
        if form == "hard":
            return -_pick(_log_softmax(logits), experts.argmax(-1))
        expert = _log_softmax(experts / temperature)
        cross_entropy = -(jnp.exp(expert) * _log_softmax(logits / temperature)).sum(-1)
        if form == "kl":
            cross_entropy -= _entropy(expert)
        return temperature**2 * cross_entropy

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        if targets.expert_top is not None and form == "hard":
            # Not the rest, even where it is likelier than any one token.
            own = token_losses(outputs.logits, targets.expert_top.tokens[..., 0])
        elif targets.expert_top is not None:
            own = divergence(*_with_rest(outputs.logits, targets.expert_top))
        else:
            own = divergence(outputs.logits, targets.expert_logits)
        own = _per_example(own, targets)
        if not elsewhere or targets.expert_elsewhere is None:
            return own
        said = targets.expert_elsewhere
        unsure = _entropy(_log_softmax(said)) / jnp.log(max(2, said.shape[-1]))
        others = unsure * divergence(outputs.elsewhere, said)
        return own + elsewhere * (targets.elsewhere_weights * others).mean()

    needs = Needs(
        expert_logits=True,
        elsewhere=elsewhere_examples if elsewhere else 0,
        top_tokens=top_tokens,
    )
    return Objective(value, needs)


def hidden_state_alignment(layers: Sequence[int], relative: bool = False) -> Objective:
    """Mean squared error to the expert's hidden states (Expert Merging, Zhang et al., 2025).

    The mean is over positions that are no padding, features, and the chosen layers.

    Args:
        layers: Which; 0 is the embeddings, L (or -1) the output of the last of L layers.
        relative: Divide each layer's error by the mean square of the expert's hidden states, so
            that layers of unlike scale count alike.

    Raises:
        ValueError: The layers are no list of numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, hidden_state_alignment
        >>> logits, states = jnp.zeros((2, 3)), jnp.zeros((2, 5, 4))  # [B, C], [B, T, H]
        >>> outputs = TaskOutputs(logits, hidden_states={-1: states})
        >>> targets = Targets(expert_hidden_states={-1: states + 2})
        >>> hidden_state_alignment([-1]).value(outputs, targets).tolist()
        [4.0, 4.0]
    """
    chosen = tuple(layers)
    if not chosen or not all(isinstance(layer, int) for layer in chosen):
        raise ValueError(f"layers is {layers}, expected a list of numbers")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        errors = []
        for layer in chosen:
            expert = targets.expert_hidden_states[layer].astype(jnp.float32)
            merged = outputs.hidden_states[layer].astype(jnp.float32)
            error = _masked_mean(jnp.square(merged - expert).mean(-1), outputs.mask)
            if relative:
                error /= _masked_mean(jnp.square(expert).mean(-1), outputs.mask).mean()
            errors.append(error)
        return jnp.stack(errors).mean(0)

    return Objective(value, Needs(hidden_states=chosen, whole_batch=relative))


def cross_entropy() -> Objective:
    """Cross-entropy to the labels, in nats: few-shot learning of coefficients (aTLAS).

    The labels of a language model are the text's own next tokens.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, cross_entropy
        >>> outputs = TaskOutputs(jnp.array([[9.0, 0.0], [9.0, 0.0]]))
        >>> targets = Targets(labels=jnp.array([0, 1]))
        >>> print(cross_entropy().value(outputs, targets).round(2))
        [0. 9.]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return _per_example(token_losses(outputs.logits, targets.labels), targets)

    return Objective(value, Needs(labels=True))


def pseudo_labels(threshold: float = 0.95) -> Objective:
    """Cross-entropy of a strong view to the class that the merged model gives the plain one.

    FixMatch (Sohn et al., NeurIPS 2020) without labels, as in aTLAS's test-time adaptation. An
    example counts if the confidence in its class, `max_c softmax(z)_c`, reaches the lower of
    `threshold` and the mean confidence over the task's examples in the batch. So the bar rises as
    the model gets surer, and there is always something to learn from (the global threshold of
    FreeMatch, Wang et al., ICLR 2023, of one batch). Pseudo-labels are not differentiated.

    Args:
        threshold: The highest bar, from 0 to 1.

    Raises:
        ValueError: The threshold is not from 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, pseudo_labels
        >>> plain = jnp.array([[9.0, 0.0], [0.1, 0.0]])  # only the first is sure enough
        >>> outputs = TaskOutputs(plain, strong=jnp.zeros((2, 2)))
        >>> print(pseudo_labels().value(outputs, Targets()).round(2))  # the mean is that of one
        [1.39 0.  ]
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected from 0 to 1")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        probabilities = jax.lax.stop_gradient(jnp.exp(_log_softmax(outputs.logits)))
        confidence = probabilities.max(-1)
        # The rounded mean of equal values may lie above them.
        bar = jnp.minimum(confidence.mean(), confidence.max())
        counts = confidence >= jnp.minimum(threshold, bar)
        loss = -_pick(_log_softmax(outputs.strong), probabilities.argmax(-1))
        return jnp.where(counts, loss, 0) * counts.size / counts.sum()

    return Objective(value, Needs(strong_view=True, whole_batch=True))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "entropy": entropy,
    "logit_alignment": logit_alignment,
    "hidden_state_alignment": hidden_state_alignment,
    "cross_entropy": cross_entropy,
    "pseudo_labels": pseudo_labels,
}
"""Objectives by their names in a recipe."""


def make_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective of a recipe.

    Args:
        name: A key of `OBJECTIVES`, or `package.module:function`.
        options: Arguments of the function.

    Raises:
        InputError: There is no such objective, or it refuses an option.

    Examples:
        >>> from adamerge_jax.objectives import make_objective
        >>> make_objective("logit_alignment", {"temperature": 2.0}).needs.expert_logits
        True
    """
    return call_registered("objectives", OBJECTIVES, name, options)


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """The objective `sum_i weight_i * objective_i`; a negative weight raises what it is for.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy, weighted_sum
        >>> outputs = TaskOutputs(jnp.zeros((1, 2)))
        >>> both = weighted_sum([(1.0, entropy()), (-0.5, entropy())])
        >>> print(both.value(outputs, Targets()).round(2))  # [B]
        [0.35]
    """
    each = [objective.needs for _, objective in terms]

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        zero = jnp.zeros(outputs.logits.shape[0])
        return sum((w * objective.value(outputs, targets) for w, objective in terms), zero)

    return Objective(
        value,
        Needs(
            expert_logits=any(needs.expert_logits for needs in each),
            labels=any(needs.labels for needs in each),
            strong_view=any(needs.strong_view for needs in each),
            hidden_states=tuple(sorted({k for needs in each for k in needs.hidden_states})),
            elsewhere=max((needs.elsewhere for needs in each), default=0),
            top_tokens=_largest([needs.top_tokens for needs in each if needs.expert_logits]),
            whole_batch=any(needs.whole_batch for needs in each),
        ),
    )


def token_losses(
    logits: Float[Array, "B ... C"], labels: Int[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Cross-entropy to each label, in nats; 0 where the label is `NOT_PREDICTED`."""
    loss = -_pick(_log_softmax(logits), jnp.maximum(labels, 0))
    return jnp.where(labels == NOT_PREDICTED, 0, loss)


def _largest(numbers: Sequence[int | None]) -> int | None:
    """The largest number of tokens asked for; None if someone asks for all."""
    return None if None in numbers else max(numbers, default=None)


def _log_softmax(logits: Float[Array, "... C"]) -> Float[Array, "... C"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _entropy(log_probabilities: Float[Array, "... C"]) -> Float[Array, "..."]:
    return -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)


def _pick(values: Float[Array, "... C"], index: Int[Array, "..."]) -> Float[Array, "..."]:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _with_rest(
    logits: Float[Array, "B T V"], expert: TopTokens
) -> tuple[Float[Array, "B T k+1"], Float[Array, "B T k+1"]]:
    """Log-probabilities of the expert's likely tokens and of all others as one: ours, its own."""
    ours = _log_softmax(logits)
    likely = jnp.take_along_axis(ours, expert.tokens, axis=-1)
    smallest = jnp.finfo(jnp.float32).tiny
    theirs = 1 - jnp.exp(expert.log_probabilities).sum(-1, keepdims=True)
    return (
        jnp.concatenate([likely, _rest(ours, expert.tokens, jnp.log(smallest))], -1),
        jnp.concatenate([expert.log_probabilities, jnp.log(jnp.maximum(theirs, smallest))], -1),
    )


def _rest(
    log_probabilities: Float[Array, "B T V"], tokens: Int[Array, "B T k"], nothing: Float[Array, ""]
) -> Float[Array, "B T 1"]:
    """Log-probability of all tokens but these, or `nothing` where these are all.

    Where the model is sure, 1 less the probabilities of these would be rounded to 0, and there
    would be no gradient.
    """
    if tokens.shape[-1] == log_probabilities.shape[-1]:
        return jnp.full((*tokens.shape[:-1], 1), nothing)
    # A mask of one byte per token rather than a second array of the log-probabilities' size.
    mark = jax.vmap(jax.vmap(lambda mask, chosen: mask.at[chosen].set(True)))
    marked = mark(jnp.zeros(log_probabilities.shape, bool), tokens)
    others = jnp.where(marked, -jnp.inf, log_probabilities)
    # `jax.nn.logsumexp` would keep an array of that size for the backward pass.
    largest = jax.lax.stop_gradient(others.max(-1, keepdims=True))
    return largest + jnp.log(jnp.exp(others - largest).sum(-1, keepdims=True))


def _per_example(values: Float[Array, "B ..."], targets: Targets) -> Float[Array, " B"]:
    """Values of examples as they are; of positions, the mean over those to be predicted."""
    if values.ndim == 1:
        return values
    return _masked_mean(values, targets.labels != NOT_PREDICTED)


def _masked_mean(values: Float[Array, "B T"], mask: Int[Array, "B T"] | None) -> Float[Array, " B"]:
    """The mean over positions where the mask is 1."""
    if mask is None:
        return values.mean(-1)
    return jnp.where(mask == 1, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
