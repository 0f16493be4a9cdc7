"""The statistics that a merge method may ask for, computed when it asks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, PyTree

from adamerge_jax.mixing import Mixture
from adamerge_jax.statistics.features import Moments, NormMoments, feature_moments
from adamerge_jax.statistics.fisher import Logits, fisher_diagonal, mean_loss
from adamerge_jax.statistics.grams import CalibrationBatch, Places, gram_matrices
from adamerge_jax.statistics.linear import Layer, Linear, Run, find_linear

Parameters = Mapping[str, Array | Mixture]


class TaskData(NamedTuple):
    """A task's calibration data and head.

    Attributes:
        batches: The function that yields all examples, in batches of one size.
        count: The number of these batches.
        logits: The function `(parameters, head, inputs)` to the logits of the task's head,
            `[B, C]` or `[B, T, V]`.
        head: The parameters of the head that the task keeps.
    """

    batches: Callable[[], Iterator[CalibrationBatch]]
    count: int
    logits: Logits
    head: PyTree[Array]


class Statistics:
    """The calibration data of K tasks, as statistics of a model's behaviour on it.

    Nothing is kept: each call runs the given parameters on the data of one task, so that a method
    decides how much there is in memory at once.
    """

    def __init__(
        self,
        run: Run,
        tasks: Sequence[TaskData],
        on_batch: Callable[[float], Any] = lambda done: None,
    ):
        """Keeps the functions; they are compiled when they first run.

        Args:
            run: The part of the model that all tasks share: from its parameters and inputs to
                anything.
            tasks: The data of each task, in the order of the experts.
            on_batch: Called after every batch with the part that is done of the passes announced.
        """
        self._run = run
        self._tasks = tasks
        self._on_batch = on_batch
        self._passes, self._done = 1, 0
        self._linear: Linear | None = None
        self._grams: Callable[..., dict[str, Array]] | None = None
        self._features: Callable[..., dict[str, Moments | NormMoments]] | None = None
        self._fisher: dict[int, Callable[..., dict[str, Array]]] = {}
        self._loss: dict[int, Callable[..., float]] = {}

    def announce(self, passes: int) -> None:
        """Says how many passes over a task's data a method is going to ask for."""
        self._passes, self._done = passes, 0

    def linear(self, parameters: Parameters) -> Linear:
        """Returns the linear layers of the model.

        Args:
            parameters: Its parameters, of which only shapes are looked at.
        """
        if self._linear is None:
            inputs = next(self._tasks[0].batches()).inputs
            self._linear = find_linear(self._run, parameters, inputs)
        return self._linear

    def grams(
        self, task: int, parameters: Parameters, places: Places
    ) -> dict[str, Float[Array, "C n n"]]:
        """Computes Gram matrices of the inputs of linear layers, `X^T X / N`.

        Rows are those of all examples' tokens or patches, without padding. It is one pass.

        Args:
            task: The position of the task whose data is read.
            parameters: The model's parameters.
            places: The weights and, of stacked ones, the layers whose inputs are asked for.

        Returns:
            By weight one matrix for each layer asked for, float32, on the device.
        """
        if self._grams is None:
            self._grams = gram_matrices(self._run, self.linear(parameters).masks)
        return self._grams(parameters, self._batches(task), places)

    def features(
        self, task: int, parameters: Parameters, other: Parameters, layer: Layer
    ) -> dict[str, Moments | NormMoments]:
        """Computes moments of two models' features in one layer; see `features.py`.

        It is one pass.

        Args:
            task: The position of the task whose data is read.
            parameters: The parameters of the one model.
            other: The parameters of the other model.
            layer: The layer, with the weights whose inputs are asked for.

        Returns:
            The moments by the name of the weight.
        """
        if self._features is None:
            self._features = feature_moments(self._run, self.linear(parameters).masks)
        return self._features(parameters, other, self._batches(task), layer)

    def fisher(
        self,
        task: int,
        parameters: Parameters,
        names: Sequence[str],
        *,
        samples: int = 0,
        seed: int = 0,
    ) -> dict[str, Float[Array, "..."]]:
        """Computes the diagonal Fisher information of a model on a task's data; see `fisher.py`.

        It is one pass.

        Args:
            task: The position of the task whose data and head are used.
            parameters: The model's parameters, arrays.
            names: The parameters asked for.
            samples: The number of labels drawn for an example; 0 for all classes of a classifier.
            seed: Decides on the draws.

        Returns:
            By name the mean over the examples, `[*shape]`, float32, on the device.
        """
        data = self._tasks[task]
        if task not in self._fisher:
            self._fisher[task] = fisher_diagonal(data.logits)
        compute, batches = self._fisher[task], self._batches(task)
        return compute(parameters, data.head, batches, names, samples, seed)

    def loss(self, task: int, parameters: Parameters) -> float:
        """Computes a model's mean loss on a task's data, in nats; it is one pass.

        It is the entropy of a classifier's prediction, or the cross-entropy of a text's tokens.

        Args:
            task: The position of the task whose data and head are used.
            parameters: The model's parameters.
        """
        data = self._tasks[task]
        if task not in self._loss:
            self._loss[task] = mean_loss(data.logits)
        return self._loss[task](parameters, data.head, self._batches(task))

    def _batches(self, task: int) -> Iterator[CalibrationBatch]:
        """Yields the batches of one pass, and tells how much is done after each."""
        data = self._tasks[task]
        for number, batch in enumerate(data.batches(), start=1):
            yield batch
            self._on_batch(min(1, (self._done + number / data.count) / self._passes))
        self._done += 1
