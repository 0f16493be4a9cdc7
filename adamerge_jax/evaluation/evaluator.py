"""The evaluation: accuracy of each task with its head, or a language model's loss per task."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.data.examples import Examples, sorted_batches
from adamerge_jax.data.pairs import TextPairs
from adamerge_jax.devices import fetch
from adamerge_jax.evaluation.answering import Answering
from adamerge_jax.evaluation.embedding_scores import embedding_measures, embedding_metric
from adamerge_jax.evaluation.problem_scores import Batches, Scorer, scorer_of
from adamerge_jax.evaluation.retention import GENERAL_TEXT, RETAINED, General, Retention
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.models.layers import Outputs
from adamerge_jax.models.problem import CLASSES
from adamerge_jax.objectives import NOT_PREDICTED, token_losses
from adamerge_jax.runs.counting import Tally
from adamerge_jax.runs.rows import ExampleScores, Kind, Measures, Metric, Row

Parameters = Mapping[str, Array]

CPU_BATCH = 16
"""Examples, at most, that a processor runs at a time. More are no faster there: a token of a text
of 96 took MiniLM 124 us in batches of 16, and 221 us in batches of 128, whose activations leave
the caches. Smaller batches have less padding, too: texts of like length share them."""


def examples_at_once(batch_size: int, *, is_cpu: bool) -> int:
    """Returns the examples that are evaluated in one call.

    Args:
        batch_size: `evaluation.batch_size`.
        is_cpu: True for models that run on the processor.
    """
    return min(batch_size, CPU_BATCH) if is_cpu else batch_size


class Evaluator:
    """Runs models of one architecture on the examples of their tasks.

    The backbone is compiled once per input shape and shared by all models and tasks.

    Attributes:
        metric: The metric of `score`.
        batch_size: Examples per batch.
        retention: The comparison with the base on general text; None where there is none.
        tally: Counts the examples that models are run on.
    """

    def __init__(
        self,
        backbone: Network,
        heads: Mapping[str, Network],
        head_parameters: Mapping[str, Parameters],
        batch_size: int,
        metric: Metric = "accuracy",
        answering: Answering | None = None,
        embeds: EmbeddingForm | None = None,
        scorers: Mapping[str, Scorer] = MappingProxyType({}),
    ):
        """Keeps the networks; they are compiled when they first run.

        Args:
            backbone: The backbone that all models share, as a function of its parameters.
            heads: Each task's head as a function of its parameters.
            head_parameters: The parameters of each task's head.
            batch_size: Examples per batch.
            metric: The metric of `score`.
            answering: The way in which language models answer prompts; None if they do not.
            embeds: The way from texts to embeddings of sentence embedders; None for other models.
            scorers: The scores of tasks that are not told by the accuracy of classes.
        """
        self.metric = metric
        self._scorers = scorers
        self._backbone = jax.jit(backbone, static_argnames="hidden_states")
        self._heads = _compiled_heads(heads)
        self._networks = heads
        self._head_parameters = head_parameters
        self.batch_size = batch_size
        self._answering = answering
        self._embeds = embeds
        self.retention: Retention | None = None
        self.tally = Tally()

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide on its numbers, as JSON."""
        answering = self._answering
        answers = answering and [answering.exact_match, answering.max_new_tokens]
        return {
            "batch_size": self.batch_size,
            "metric": self.metric,
            "answers": answers,
            "embeds": self._embeds and dataclasses.asdict(self._embeds),
            "scorers": {
                task: [scorer.metrics, scorer.class_names] for task, scorer in self._scorers.items()
            },
        }

    def with_heads(self, heads: Mapping[str, Parameters]) -> "Evaluator":
        """Returns an evaluator with other parameters of heads; it shares what is compiled.

        Args:
            heads: Parameters by task and name; those that are not named stay.
        """
        evaluator = copy.copy(self)
        evaluator._head_parameters = {
            task: {**parameters, **heads.get(task, {})}
            for task, parameters in self._head_parameters.items()
        }
        return evaluator

    def run(
        self,
        parameters: Parameters,
        task: str,
        inputs: Mapping[str, np.ndarray],
        hidden_states: Sequence[int] = (),
    ) -> tuple[Float[Array, "B C"], dict[int, Float[Array, "B T H"]]]:
        """Computes the logits of one batch, and the hidden states of some layers.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            inputs: The model's inputs, `[B, ...]`.
            hidden_states: Layers, 0 for the embeddings.

        Returns:
            The logits, `[B, C]` or a language model's `[B, T, V]`, or a sentence embedder's
            embeddings, `[B, texts, H]`; and the hidden states by layer.
        """
        outputs = self._run_backbone(parameters, inputs, hidden_states=bool(hidden_states))
        logits = self._apply_head(parameters, task, outputs)
        return logits, {layer: outputs.hidden_states[layer] for layer in hidden_states}

    def logits(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> Float[np.ndarray, "N C"]:
        """Computes a model's logits for each example.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            examples: N examples.

        Returns:
            The logits in the order of the examples, `[N, C]`, or the embeddings, `[N, texts, H]`.
        """
        order, rows = zip(*self.batches(parameters, task, examples), strict=True)
        return np.concatenate(rows)[np.argsort(np.concatenate(order))]

    def batches(self, parameters: Parameters, task: str, examples: Examples) -> Batches:
        """Yields a model's logits batch by batch, with the indices of their examples.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            examples: N examples; texts of like length share a batch.
        """
        for index, logits in self._batches_of_heads(parameters, task, examples, [self]):
            yield index, logits[0]

    def _batches_of_heads(
        self,
        parameters: Parameters,
        task: str,
        examples: Examples,
        evaluators: Sequence["Evaluator"],
    ) -> Iterator[tuple[Int[np.ndarray, " n"], list[Float[np.ndarray, "n ..."]]]]:
        """Yields the logits by the heads of several evaluators; the backbone runs once."""
        for index, inputs in sorted_batches(examples, self.batch_size):
            outputs = self._run_backbone(parameters, inputs)
            by_head = [e._apply_head(parameters, task, outputs) for e in evaluators]
            yield index, [fetch(logits)[: len(index)] for logits in by_head]

    def _run_backbone(
        self,
        parameters: Parameters,
        inputs: Mapping[str, np.ndarray],
        *,
        hidden_states: bool = False,
    ) -> Outputs:
        self.tally.add(len(next(iter(inputs.values()))))
        return self._backbone(parameters, inputs, hidden_states=hidden_states)

    def _apply_head(
        self, parameters: Parameters, task: str, outputs: Outputs
    ) -> Float[Array, "B C"]:
        """Applies a task's head to the backbone's outputs."""
        head = complete_head(self._networks[task], self._head_parameters[task], parameters)
        return self._heads[task](head, outputs)

    def example_scores(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> ExampleScores:
        """Computes a model's score on each labelled example.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            examples: N labelled examples.

        Returns:
            In the order of the examples, `[N]`: 1 for the right class and 0 for a wrong one, or the
            first scores of the task in `problem_scores.py`; or for a language model the loss in
            nats, summed over the predicted tokens, and their number; or for a sentence embedder
            those of `embedding_scores.py`.
        """
        if self._embeds is not None:
            return self.measures(parameters, task, examples)[embedding_metric(examples)]
        if self.metric != "loss":
            return next(iter(self.measures(parameters, task, examples).values()))
        return self._token_scores(parameters, task, examples)["loss"]

    def measures(
        self, parameters: Parameters, task: str, examples: Examples, model: str = "expert"
    ) -> Measures:
        """Computes a model's scores on labelled examples by all metrics of its kind.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            examples: N labelled examples.
            model: The model's name, to show while it answers.

        Returns:
            `example_scores` by the evaluator's metric, and for a language model further: the
            predicted tokens that are the likeliest, by their number; the loss on those that are no
            end, where some are; 1 or 0 for the model's own answer, where it is asked for one.
        """
        if self._embeds is not None:
            embeddings = self._embeddings(parameters, task, examples)
            return embedding_measures(embeddings, examples, self._embeds.similarity)
        if self.metric != "loss":
            batches = self.batches(parameters, task, examples)
            return self._scorer(task).measure(batches, examples, task)
        measures = self._token_scores(parameters, task, examples)
        if (measures["answer_loss"].counts == measures["loss"].counts).all():
            del measures["answer_loss"]
        if self.is_asked(examples):
            measures["exact_match"] = self.answer_scores(
                parameters, examples, f"answers of {model} on {task}"
            )
        return measures

    def _scorer(self, task: str) -> Scorer:
        """Returns the scores of a task's head."""
        return self._scorers.get(task) or scorer_of(CLASSES)

    def _embeddings(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> Float[np.ndarray, "N 2 H"]:
        """Computes the embeddings of pairs of texts; of a text in many pairs once."""
        if not isinstance(examples, TextPairs):
            return self.logits(parameters, task, examples)
        texts, index = examples.distinct()
        return self.logits(parameters, task, texts)[:, 0][index]

    def is_asked(self, examples: Examples) -> bool:
        """Returns True if models are to answer the prompts of a task's examples."""
        return self._answering is not None and self._answering.is_asked(examples)

    def answer_scores(
        self, parameters: Parameters, examples: Examples, words: str = "answers"
    ) -> ExampleScores:
        """Compares a model's own answers with the responses.

        Args:
            parameters: The parameters of the backbone by name.
            examples: N examples of which `is_asked` is true.
            words: Words for the answers, to show with their number.

        Returns:
            1 for each answer that is the response, and 0 for others, `[N]`.
        """
        assert self._answering is not None and examples.answers is not None  # is_asked
        return self._answering.scores(parameters, examples.answers, words)

    def _token_scores(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> dict[Metric, ExampleScores]:
        """Computes the sums of a language model's scores over each example's tokens."""
        metrics: tuple[Metric, ...] = ("loss", "token_accuracy", "answer_loss")
        sums = np.zeros((len(metrics), len(examples)), np.float32)
        counts = np.zeros((len(metrics), len(examples)), np.int32)
        for index, inputs in sorted_batches(examples, self.batch_size):
            logits, _ = self.run(parameters, task, inputs)
            labels = examples.take_labels(index, logits.shape[1])
            is_end = examples.take_ends(index, logits.shape[1])
            without_ends = np.where(is_end, NOT_PREDICTED, labels)
            # The last batch repeats examples, which do not count.
            missing = [(0, len(logits) - len(labels)), (0, 0)]
            padded, padded_ends = (
                np.pad(array, missing, constant_values=NOT_PREDICTED)
                for array in (labels, without_ends)
            )
            losses, right, on_answers = _sum_scores(logits, padded, padded_ends)
            for row, values in enumerate((losses, right, on_answers)):
                sums[row, index] = fetch(values)[: len(index)]
            counts[:, index] = (labels != NOT_PREDICTED).sum(-1)
            counts[2, index] = (without_ends != NOT_PREDICTED).sum(-1)
        return {metric: ExampleScores(sums[row], counts[row]) for row, metric in enumerate(metrics)}

    def score(self, parameters: Parameters, task: str, examples: Examples) -> float:
        """Computes a model's score on labelled examples.

        Args:
            parameters: The parameters of the backbone by name.
            task: The task whose head is used.
            examples: Labelled examples.

        Returns:
            The fraction of examples with the right class, from 0 to 1; for a language model
            the mean loss over all predicted tokens, in nats per token; or for a sentence embedder
            Spearman's correlation or the recall.
        """
        return self.example_scores(parameters, task, examples).mean

    def row(
        self,
        method: str,
        parameters: Parameters,
        data: Mapping[str, Examples],
        kind: Kind = "baseline",
    ) -> Row:
        """Returns a row of the table: a model's scores on labelled examples of each task."""
        measures = {task: self.measures(parameters, task, data[task], method) for task in data}
        row = Row.of_measures(method, measures, kind)
        return row._replace(further=(*row.further, *self._general_rows(method, parameters, kind)))

    def rows_with_heads(
        self,
        parameters: Parameters,
        data: Mapping[str, Examples],
        heads: Mapping[str, tuple["Evaluator", Kind]],
    ) -> list[Row]:
        """Returns a row for each set of heads of one backbone, which runs once.

        Args:
            parameters: The parameters of the backbone by name.
            data: The labelled examples of each task.
            heads: The evaluator with each set of heads, and the kind of its row, by the row's name.
        """
        measures: dict[str, dict[str, Measures]] = {name: {} for name in heads}
        evaluators = [evaluator for evaluator, _ in heads.values()]
        for task, examples in data.items():
            batches = list(self._batches_of_heads(parameters, task, examples, evaluators))
            for position, name in enumerate(heads):
                of_head = ((index, logits[position]) for index, logits in batches)
                measures[name][task] = self._scorer(task).measure(of_head, examples, task)
        return [Row.of_measures(name, measures[name], kind) for name, (_, kind) in heads.items()]

    def watch(self, general: General, base: Parameters) -> None:
        """Has all rows to come say how far a model is from the base on general text.

        Args:
            general: The general text.
            base: The parameters of the base.
        """
        asked = partial(self.run, base, RETAINED)
        self.retention = Retention(general, asked, self.batch_size)

    def _general_rows(self, method: str, parameters: Parameters, kind: Kind) -> list[Row]:
        if self.retention is None:
            return []
        measures = self.retention.measures(lambda inputs: self.run(parameters, RETAINED, inputs)[0])
        return [
            Row.of_examples(method, {GENERAL_TEXT: scores}, metric, kind)
            for metric, scores in measures.items()
        ]


def _compiled_heads(heads: Mapping[str, Network]) -> dict[str, Callable[..., Array]]:
    """Compiles heads; the same head of several tasks once, as each takes memory and time."""
    distinct: list[tuple[Network, Callable[..., Array]]] = []
    compiled = {}
    for task, head in heads.items():
        same = (function for other, function in distinct if other.is_same(head))
        compiled[task] = next(same, None) or jax.jit(head)
        distinct.append((head, compiled[task]))
    return compiled


@jax.jit
def _sum_scores(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], answers: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
    """Returns the loss, the number of tokens that are the likeliest, and the loss on answers."""
    losses = token_losses(logits, labels)
    # The likeliest token of NaN is token 0, and would sometimes be right.
    is_right = (logits.argmax(-1) == labels) & ~jnp.isnan(losses)
    on_answers = jnp.where(answers == NOT_PREDICTED, 0, losses)
    return losses.sum(-1), is_right.sum(-1), on_answers.sum(-1)
