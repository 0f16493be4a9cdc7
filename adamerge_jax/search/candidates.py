"""The merges that a search scores: from a list of numbers to coefficients and parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import Values, constant
from adamerge_jax.coefficients.layer_groups import layer_group_patterns
from adamerge_jax.mixing import materialize_compiled, mix
from adamerge_jax.parameter_names import unstacked_shapes
from adamerge_jax.pipeline.learn import LearningInputs, make_coefficients
from adamerge_jax.recipes.build import GranularityChoice

Point = Float[np.ndarray, " n"]
"""Coefficients as a search has them: those of each group one after the other, K by K."""


class Candidates:
    """The merges of one set of experts by coefficients that many tensors share.

    Attributes:
        size: The length of a point.
        granularity: The granularity of the coefficients, by name.
    """

    def __init__(self, inputs: LearningInputs, layer_groups: int):
        """Chooses the coefficients.

        Args:
            inputs: The models and task vectors.
            layer_groups: The number of groups of neighbouring layers with coefficients of their
                own; 1 for one coefficient per expert.

        Raises:
            InputError: There are fewer layers than groups.
        """
        self.inputs = inputs
        self.granularity = GranularityChoice("task", {})
        if layer_groups > 1:
            patterns = layer_group_patterns(inputs.mixed, layer_groups)
            self.granularity = GranularityChoice("groups", {"patterns": patterns})
        self._granularity = self.granularity.make(inputs.shapes)
        self._zeros = self._granularity.init(constant(inputs.shapes, inputs.experts, 0.0))
        # A layer that no expert changed is in a stack with those that some did, but is not mixed.
        shapes = unstacked_shapes(inputs.shapes)
        mixed = {name: shapes[name] for name in inputs.mixed}
        self._groups = list(self.granularity.make(mixed).init(constant(mixed, 1, 0.0)))
        self.size = len(self._groups) * inputs.experts

    def all_at(self, value: float) -> Point:
        """Returns the point with one value everywhere: task arithmetic."""
        return np.full(self.size, value, np.float64)

    def by_group(self, point: Point) -> dict[str, list[float]]:
        """Returns the K coefficients of each group."""
        rows = point.reshape(len(self._groups), self.inputs.experts)
        return dict(zip(self._groups, rows.tolist(), strict=True))

    def point(self, by_group: Mapping[str, list[float]]) -> Point:
        """Returns the point of `by_group`."""
        return np.array([by_group[group] for group in self._groups], np.float64).ravel()

    def coefficients(self, point: Point, step: int) -> Coefficients:
        """Returns the coefficients of a point as they are saved.

        Args:
            point: The point.
            step: The number of evaluations after which it was found.
        """
        return make_coefficients(self.inputs, self.granularity, self._values(point), step)

    def parameters(self, point: Point) -> dict[str, Array]:
        """Returns the parameters of the merged model by name; compiled once for all points."""
        scales = self._granularity.scales(self._values(point))
        return materialize_compiled(mix(self.inputs.theta_start, self.inputs.deltas, scales))

    def _values(self, point: Point) -> Values:
        values = {
            group: jnp.asarray(row, jnp.float32)[None]
            for group, row in self.by_group(point).items()
        }
        return {**self._zeros, **values}
