"""The arguments of an objective, outputs and targets, and the specification of them."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from adamerge_jax.errors import InputError

NOT_PREDICTED = -100
"""The label of a position where no token is to be predicted, as in `transformers`."""


class TaskOutputs(NamedTuple):
    """The merged model's outputs for one task's examples.

    Attributes:
        logits: `[B, C]`, from the task's own head; `[B, T, V]` from a language model, and
            `[B, T, C]` where words are classified; `[B, C, 2]`, for each label the choice of two;
            or `[B, R]` numbers.
        hidden_states: `[B, T, H]` by layer (0 is the embeddings), of the layers that some
            objective asks for.
        mask: `[B, T]`, 1 where a position is no padding, or None where nothing is padded.
        augmented_logits: The logits `[B, C]` of the augmented examples, or None where no objective
            asks for them.
        cross_task_logits: The logits `[B, tasks - 1, C]` of the task's head on the examples of all
            other tasks, or None where no objective asks for them.
        embeddings: A sentence embedder's embeddings of the one text or the two of each example,
            `[B, texts, H]`; its logits are zeros, `[B, 1]`. None for other models.
    """

    logits: Float[Array, "B ... C"]
    hidden_states: Mapping[int, Float[Array, "B T H"]] = {}
    mask: Int[Array, "B T"] | None = None
    augmented_logits: Float[Array, "B C"] | None = None
    cross_task_logits: Float[Array, "B others C"] | None = None
    embeddings: Float[Array, "B texts H"] | None = None

    @property
    def strong(self) -> Float[Array, "B C"] | None:
        """The old name of `augmented_logits`."""
        warnings.warn(
            "TaskOutputs.strong is now augmented_logits", DeprecationWarning, stacklevel=2
        )
        return self.augmented_logits


class TopTokens(NamedTuple):
    """An expert's distribution of the next token, without the unlikely ones.

    Attributes:
        tokens: `[B, T, k]`, the most likely ones, most likely first.
        log_probabilities: `[B, T, k]`, of these; all other tokens share what is missing to 1.
    """

    tokens: Int[Array, "B T k"]
    log_probabilities: Float[Array, "B T k"]


class CrossTaskTargets(NamedTuple):
    """The logits of a task's expert on the examples of all other tasks.

    Row b has the b-th example of each other task in the batch.

    Attributes:
        expert_logits: `[B, tasks - 1, C]`, from the expert's own head.
        weights: `[B, tasks - 1]`, the weight of each of these in their mean: 0 where the expert
            was not asked.
    """

    expert_logits: Float[Array, "B others C"]
    weights: Float[Array, "B others"]


class Targets(NamedTuple):
    """The targets of one task's examples; a field is None if no objective asks for it.

    A pytree: every array has a leading axis over the B examples, and whoever only carries targets
    knows no field. A new kind of target is a field here, which may be a pytree of its own, and a
    field of `TargetSpec`; `data.expert_targets.expert_targets` computes it.

    Attributes:
        expert_logits: `[B, C]` or `[B, T, V]`, from the task's own expert, or None.
        expert_hidden_states: `[B, T, H]` by layer, the expert's own.
        labels: `[B]`, class indices, or None; `[B, T]`, the token to be predicted at each position
            or `NOT_PREDICTED`, for a language model; so, too, the classes of words; 0 or 1 for each
            label, `[B, C]`; or numbers, `[B, R]`.
        expert_top: The likely tokens, in place of `expert_logits`, or None.
        cross_task: The expert on the examples of all other tasks, or None.
        expert_embeddings: `[B, texts, H]`, the expert's embeddings of each example, or None.
        partners: `[B]`, the number of each pair's second text, one for all pairs with the same
            one; None where all are taken for different.
        counted: `[B, T]`, True where the class of a token counts, where words are classified; None
            where labels say so, or where there is one prediction for an example.
        expert_spread: `[B, R]`, the standard deviation of the expert's numbers over all of the
            task's examples, the same for each, or None.
        prompts: `[B, T]`, True for the positions of a language model that read a prompt and have
            one more of its tokens behind them; None but while coefficients are learned.
    """

    expert_logits: Float[Array, "B ... C"] | None = None
    expert_hidden_states: Mapping[int, Float[Array, "B T H"]] = {}
    labels: Int[Array, "B ..."] | Float[Array, "B R"] | None = None
    expert_top: TopTokens | None = None
    cross_task: CrossTaskTargets | None = None
    expert_embeddings: Float[Array, "B texts H"] | None = None
    partners: Int[Array, " B"] | None = None
    counted: Bool[Array, "B T"] | None = None
    expert_spread: Float[Array, "B R"] | None = None
    prompts: Bool[Array, "B T"] | None = None


class TargetSpec(NamedTuple):
    """The outputs and targets that an objective asks for beside the merged model's logits.

    `a | b` asks for what a or b asks for.

    Attributes:
        expert_logits: True if the targets must hold the expert's logits.
        labels: True if they must hold labels.
        augmented: True if the outputs must hold the logits of augmented examples.
        hidden_states: Layers that outputs and targets must hold, from 0 (the embeddings) to L,
            or -1 for the last.
        cross_task: The number of examples of each other task that the expert is asked about, for
            `cross_task_logits` in the outputs and `cross_task` in the targets while coefficients
            are learned; 0 for none.
        top_tokens: The number of likely tokens of the expert that stand for its logits; None for
            all.
        whole_batch: True if the value of an example depends on the others in its batch, other than
            by a mean over them that is added to it.
        embeddings: True if the outputs must hold embeddings.
        expert_embeddings: True if the targets must hold the expert's embeddings.
        pairs: True if each example must have two texts.
        expert_spread: True if the targets must hold the spread of the expert's numbers.
        by_label: True if the second axis of the expert's logits is of labels, not of positions.
        prompts: True if the targets must hold the positions of prompts while coefficients are
            learned.

    Examples:
        >>> from adamerge_jax.objectives import TargetSpec
        >>> spec = TargetSpec(labels=True) | TargetSpec(hidden_states=(3,))
        >>> spec.labels, spec.hidden_states, spec.expert
        (True, (3,), True)
    """

    expert_logits: bool = False
    labels: bool = False
    augmented: bool = False
    hidden_states: tuple[int, ...] = ()
    cross_task: int = 0
    top_tokens: int | None = None
    whole_batch: bool = False
    embeddings: bool = False
    expert_embeddings: bool = False
    pairs: bool = False
    expert_spread: bool = False
    by_label: bool = False
    prompts: bool = False

    @property
    def expert(self) -> bool:
        """True if some of the targets come from the task's expert."""
        return self.expert_logits or self.expert_embeddings or bool(self.hidden_states)

    def __or__(self, other: "TargetSpec") -> "TargetSpec":
        numbers = [spec.top_tokens for spec in (self, other) if spec.expert_logits]
        return TargetSpec(
            self.expert_logits or other.expert_logits,
            self.labels or other.labels,
            self.augmented or other.augmented,
            tuple(sorted({*self.hidden_states, *other.hidden_states})),
            max(self.cross_task, other.cross_task),
            # All logits, if one of the two wants all.
            None if None in numbers else max(numbers, default=None),
            self.whole_batch or other.whole_batch,
            self.embeddings or other.embeddings,
            self.expert_embeddings or other.expert_embeddings,
            self.pairs or other.pairs,
            self.expert_spread or other.expert_spread,
            self.by_label or other.by_label,
            self.prompts or other.prompts,
        )

    def require_given(self, outputs: TaskOutputs, targets: Targets) -> None:
        """Refuses outputs and targets without something that is asked for.

        Raises:
            InputError: Names what is missing, and who makes it.
        """
        layers = set(self.hidden_states)
        missing = {
            "the expert's logits in the targets; ask_expert makes them": self.expert_logits
            and targets.expert_logits is None
            and targets.expert_top is None,
            "labels in the targets; give them to the examples": self.labels
            and targets.labels is None,
            "the logits of a strong view in the outputs; recipes make them": self.augmented
            and outputs.augmented_logits is None,
            "the expert's hidden states in the targets; ask_expert makes them": not layers
            <= targets.expert_hidden_states.keys(),
            "hidden states in the outputs; the forward function returns them": not layers
            <= outputs.hidden_states.keys(),
            "embeddings in the outputs; sentence embedders have them": self.embeddings
            and outputs.embeddings is None,
            "the expert's embeddings in the targets; ask_expert makes them": self.expert_embeddings
            and targets.expert_embeddings is None,
            "the spread of the expert's numbers in the targets; ask_expert makes it": (
                self.expert_spread and targets.expert_spread is None
            ),
            "two texts of each example; pairs have them": self.pairs
            and outputs.embeddings is not None
            and outputs.embeddings.shape[1] != 2,
        }
        for part, is_missing in missing.items():
            if is_missing:
                raise InputError(f"an objective must be given {part}")
