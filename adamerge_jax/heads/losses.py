"""The losses by which heads are fitted to their experts' outputs, convex in the head's outputs."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

Outputs = Float[np.ndarray, "N C"]


class HeadLoss(NamedTuple):
    """A loss of a head's outputs beside those of the expert.

    Attributes:
        wanted: The function from the expert's outputs to what the loss compares with.
        value: The function `(outputs, wanted) -> loss, gradient with respect to the outputs`, both
            summed over the examples.
        excess: The function `(outputs, the expert's outputs) -> mean loss over the least possible`.
    """

    wanted: Callable[[Outputs], Outputs]
    value: Callable[[Outputs, Outputs], tuple[float, Outputs]]
    excess: Callable[[Outputs, Outputs], float]


def _cross_entropy(logits: Outputs, wanted: Outputs) -> tuple[float, Outputs]:
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    return -(wanted * log_probabilities).sum(), np.exp(log_probabilities) - wanted


def _divergence(logits: Outputs, expert_logits: Outputs) -> float:
    log_targets = scipy.special.log_softmax(expert_logits, axis=-1)
    difference = log_targets - scipy.special.log_softmax(logits, axis=-1)
    return float((np.exp(log_targets) * difference).sum(-1).mean())


OF_CLASSES = HeadLoss(
    lambda logits: scipy.special.softmax(logits, axis=-1), _cross_entropy, _divergence
)
"""The KL divergence of the expert's classes from the head's, in nats."""


def _binary_cross_entropy(logits: Outputs, wanted: Outputs) -> tuple[float, Outputs]:
    return (np.logaddexp(0, logits) - wanted * logits).sum(), scipy.special.expit(logits) - wanted


def _binary_divergence(logits: Outputs, expert_logits: Outputs) -> float:
    wanted = scipy.special.expit(expert_logits)
    losses = [_binary_cross_entropy(outputs, wanted)[0] for outputs in (logits, expert_logits)]
    return float(losses[0] - losses[1]) / len(logits)


OF_LABELS = HeadLoss(
    lambda logits: scipy.special.expit(logits), _binary_cross_entropy, _binary_divergence
)
"""The KL divergence of the expert's probability of each label from the head's, in nats."""


def of_choices(choices: int) -> HeadLoss:
    """Returns the KL divergence of the expert's choice from the head's, in nats.

    Outputs are `[N, 1]`, one for each choice; those of an example follow each other.

    Args:
        choices: The number of choices of an example.
    """

    def value(outputs: Outputs, wanted: Outputs) -> tuple[float, Outputs]:
        total, slope = _cross_entropy(outputs.reshape(-1, choices), wanted)
        return total, slope.reshape(-1, 1)

    return HeadLoss(
        lambda outputs: OF_CLASSES.wanted(outputs.reshape(-1, choices)),
        value,
        lambda outputs, expert: _divergence(
            outputs.reshape(-1, choices), expert.reshape(-1, choices)
        ),
    )


def of_numbers(expert_outputs: Outputs) -> HeadLoss:
    """Returns half of the squared difference of numbers, in units of the expert's spread.

    Args:
        expert_outputs: The expert's numbers, whose spread is their standard deviation.
    """
    squared_spread = np.square(spread_of(expert_outputs))

    def value(outputs: Outputs, wanted: Outputs) -> tuple[float, Outputs]:
        slope = (outputs - wanted) / squared_spread
        return float((slope * (outputs - wanted)).sum() / 2), slope

    return HeadLoss(
        lambda outputs: outputs,
        value,
        lambda outputs, wanted: value(outputs, wanted)[0] / len(outputs),
    )


def spread_of(numbers: Float[np.ndarray, "N R"]) -> Float[np.ndarray, " R"]:
    """Returns the standard deviation of each number, 1 for one that is always the same."""
    spread = np.asarray(numbers, np.float64).std(0)
    return np.where(spread > 0, spread, 1)
