"""Alignment with the experts' logits, on their own and on the other tasks' examples."""

import warnings

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import (
    log_softmax,
    masked_mean,
    mean_per_example,
    pick,
    shannon_entropy,
    token_losses,
    top_with_rest,
    with_rest,
)
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def logit_alignment(
    temperature: float = 1.0,
    form: str = "soft",
    cross_task: float = 0.0,
    cross_task_examples: int = 100,
    top_tokens: int | None = 64,
    prompts: float = 0.3,
    *,
    elsewhere: float | None = None,
    elsewhere_examples: int | None = None,
) -> Objective:
    """Cross-entropy from the expert's class distribution to the merged model's, in nats.

    With z the merged model's logits, e the expert's and T the temperature:

    - `soft`: `-T^2 sum_c softmax(e / T)_c log softmax(z / T)_c` (Hinton et al., 2015). It is shown
      less its floor, the expert's own entropy, so that 0 is perfect.
    - `kl`: the same, and computed so; the same gradient.
    - `hard`: cross-entropy to the class that the expert predicts (SyMerge, Jung et al., 2026).

    Args:
        temperature: T; over 1 asks for the order of unlikely classes too.
        form: One of these three.
        cross_task: Weight of the mean of the same over the examples of all other tasks, each times
            `H(softmax(e)) / log C`, from 0 to 1: an expert has an opinion on any example, so that
            each task is learned from the examples of all, but the surer it is of an example that
            it does not know the less that opinion is worth. It counts while learning, not on the
            held-out data. Language models have no heads of their tasks, so that experts would
            contradict each other: there it does not count.
        cross_task_examples: The number of examples of each other task, drawn at random, that an
            expert is asked about; they stand for all of that task.
        top_tokens: k: keep the k likeliest tokens of a language model's expert at each position,
            and what is left as the probability of one more token; None for all. Classes are always
            kept all.
        prompts: Weight of the mean of the same over the tokens of a language model's prompts,
            but for those that all prompts of the task begin with. Responses of few tokens tell
            little of an expert; what it makes of the prompts in front of them tells more. It
            counts while learning, not on the held-out data.
        elsewhere: The old name of `cross_task`.
        elsewhere_examples: The old name of `cross_task_examples`.

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
    if elsewhere is not None or elsewhere_examples is not None:
        warnings.warn(
            "logit_alignment: elsewhere and elsewhere_examples are now cross_task and "
            "cross_task_examples",
            DeprecationWarning,
            stacklevel=2,
        )
        cross_task = cross_task if elsewhere is None else elsewhere
        if elsewhere_examples is not None:
            cross_task_examples = elsewhere_examples
    if form not in ("soft", "kl", "hard"):
        raise ValueError(f"form is {form!r}, expected 'soft', 'kl' or 'hard'")
    if not 0 < temperature <= 1e6:
        raise ValueError(f"temperature is {temperature}, expected over 0 and up to 1e6")
    if not 0 <= cross_task <= 1e6:
        raise ValueError(f"cross_task is {cross_task}, expected from 0 to 1e6")
    if not 1 <= cross_task_examples <= 10**9:
        raise ValueError(f"cross_task_examples is {cross_task_examples}, expected from 1 to 1e9")
    if not 0 <= prompts <= 1e6:
        raise ValueError(f"prompts is {prompts}, expected from 0 to 1e6")
    if top_tokens is not None and not 1 <= top_tokens <= 10**9:
        raise ValueError(f"top_tokens is {top_tokens}, expected from 1 to 1e9")

    def divergence(
        logits: Float[Array, "B ... C"], expert_logits: Float[Array, "B ... C"]
    ) -> Float[Array, "B ..."]:
        if form == "hard":
            return -pick(log_softmax(logits), expert_logits.argmax(-1))
        expert = log_softmax(expert_logits / temperature)
        cross_entropy = -(jnp.exp(expert) * log_softmax(logits / temperature)).sum(-1)
        if form == "kl":
            cross_entropy -= shannon_entropy(expert)
        return temperature**2 * cross_entropy

    def over_positions(losses: Float[Array, "B ..."], targets: Targets) -> Float[Array, " B"]:
        mean = mean_per_example(losses, targets)
        if not prompts or targets.prompts is None:
            return mean
        return mean + prompts * masked_mean(losses, targets.prompts)

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        if targets.expert_top is not None and form == "hard":
            # Not the rest, even where it is likelier than any one token.
            losses = token_losses(outputs.logits, targets.expert_top.tokens[..., 0])
        elif targets.expert_top is not None:
            losses = divergence(*with_rest(outputs.logits, targets.expert_top))
        else:
            losses = divergence(outputs.logits, targets.expert_logits)
        losses = over_positions(losses, targets)
        if not cross_task or targets.cross_task is None:
            return losses
        expert_logits, weights = targets.cross_task
        others = _unsureness(expert_logits) * divergence(outputs.cross_task_logits, expert_logits)
        return losses + cross_task * (weights * others).mean()

    def floor(targets: Targets) -> Float[Array, " B"]:
        """Returns the expert's own entropy, which no model goes below."""

        def own_entropy(expert_logits: Float[Array, "B ... C"]) -> Float[Array, "B ..."]:
            return temperature**2 * shannon_entropy(log_softmax(expert_logits / temperature))

        top = targets.expert_top
        expert_logits = targets.expert_logits if top is None else top_with_rest(top)
        entropies = over_positions(own_entropy(expert_logits), targets)
        if not cross_task or targets.cross_task is None:
            return entropies
        expert_logits, weights = targets.cross_task
        others = _unsureness(expert_logits) * own_entropy(expert_logits)
        return entropies + cross_task * (weights * others).mean()

    spec = TargetSpec(
        expert_logits=True,
        cross_task=cross_task_examples if cross_task else 0,
        top_tokens=top_tokens,
        prompts=prompts > 0,
    )
    return Objective(value, spec, floor if form == "soft" else None)


def _unsureness(expert_logits: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Returns the entropy of each distribution as a part of the largest, from 0 to 1."""
    classes = max(2, expert_logits.shape[-1])
    return shannon_entropy(log_softmax(expert_logits)) / jnp.log(classes)
