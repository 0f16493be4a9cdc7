"""Models that read one of several choices at a time, and compare them: multiple choice."""

from collections.abc import Mapping

from jaxtyping import Array, Float, PyTree

from adamerge_jax.models.layers import Outputs
from adamerge_jax.models.network import Network


class ChoicesBackbone(Network):
    """A backbone that reads every choice by itself: `(parameters, inputs, hidden_states=False)`.

    Inputs are `[B, N, T]`, N choices for each example. Of the outputs `pooled` is `[B, N, H]`, and
    of the token vectors, `[B, N * T, H]`, the second choice's follow the first one's.

    Attributes:
        shapes: Shape and dtype of every parameter by name, `[L, *shape]` where stacked.
    """

    def __init__(self, backbone: Network):
        """Wraps a backbone of single texts."""
        self.shapes = backbone.shapes
        self._backbone = backbone

    def __call__(
        self, parameters: Mapping[str, Array], inputs: PyTree, hidden_states: bool = False
    ) -> Outputs:
        """Runs the backbone on all choices."""
        examples, choices, _ = inputs["input_ids"].shape
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in inputs.items()}
        outputs = self._backbone(parameters, flat, hidden_states=hidden_states)
        pooled, last, states = outputs.pooled, outputs.last_hidden_state, outputs.hidden_states
        features = last.shape[-1]
        return Outputs(
            None if pooled is None else pooled.reshape(examples, choices, -1),
            last.reshape(examples, -1, features),
            None if states is None else states.reshape(len(states), examples, -1, features),
            inputs=inputs,
        )


class ChoicesHead(Network):
    """A head of one output for each choice: `(parameters, outputs) -> [B, N]`.

    Attributes:
        shapes: Shape and dtype of every parameter by name.
    """

    def __init__(self, head: Network):
        """Wraps a head of single texts."""
        self.shapes = head.shapes
        self._head = head

    def __call__(self, parameters: Mapping[str, Array], outputs: Outputs) -> Float[Array, "B N"]:
        """Applies the head to all choices.

        Returns:
            Its output for each choice, `[B, N]`; `[B, N, H]` of a head that has features in place
            of its output.
        """
        assert outputs.inputs is not None  # by `ChoicesBackbone`
        examples, choices, length = outputs.inputs["input_ids"].shape
        pooled, last = outputs.pooled, outputs.last_hidden_state
        flat = outputs._replace(
            pooled=None if pooled is None else pooled.reshape(-1, pooled.shape[-1]),
            last_hidden_state=last.reshape(-1, length, last.shape[-1]),
        )
        logits = self._head(parameters, flat)
        by_choice = logits.reshape(examples, choices, -1)
        return by_choice[..., 0] if by_choice.shape[-1] == 1 else by_choice

    def is_same(self, other: object) -> bool:
        """Returns True if the other is the same function of parameters."""
        return isinstance(other, ChoicesHead) and self._head.is_same(other._head)
