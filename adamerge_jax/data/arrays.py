"""Examples that are arrays of model inputs, as they are or in a NumPy file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import COMPLETED, Examples, completed
from adamerge_jax.data.labels import LabelColumn, give_labels
from adamerge_jax.data.tables import class_indices
from adamerge_jax.data.token_limits import TokenLimits, require_mask
from adamerge_jax.errors import InputError
from adamerge_jax.models.problem import CLASSES, LABELS, NUMBERS, Problem

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import DataSource


class ArrayExamples(Examples):
    """Model inputs as they are, and labels where there are some.

    Token ids of texts, `[N, T]`, are padded where the texts of other tasks are longer.

    Attributes:
        labels: Class index of each example, `[N]`, or None.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import ArrayExamples
        >>> examples = ArrayExamples({"images": np.zeros((10, 8, 8))}, labels=np.arange(10))
        >>> len(examples), examples.take(np.array([3, 4]), length=0)["images"].shape
        (10, (2, 8, 8))
    """

    def __init__(self, inputs: dict[str, np.ndarray], labels: Int[np.ndarray, " N"] | None = None):
        """Takes the inputs, `[N, ...]` by the name under which the model reads them.

        Raises:
            InputError: Inputs and labels differ in their number of examples, or the arrays of
                texts in their number of tokens.
        """
        sizes = {name: len(array) for name, array in inputs.items()}
        if labels is not None:
            sizes["labels"] = len(labels)
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"examples differ in number ({counts}); expected as many of each")
        tokens = {name: inputs[name].shape for name in ("input_ids", *COMPLETED) if name in inputs}
        if any(len(shape) != 2 for shape in tokens.values()) or len(set(tokens.values())) > 1:
            shapes = ", ".join(f"{name} {shape}" for name, shape in tokens.items())
            raise InputError(
                f"token arrays have the shapes {shapes}; expected (examples, tokens), for all the "
                "same"
            )
        self._inputs = inputs
        # With a decoder's inputs beside them, texts have two lengths.
        is_text = "input_ids" in inputs and inputs.keys() <= {"input_ids", *COMPLETED}
        self._length = inputs["input_ids"].shape[1] if is_text else 0
        self.labels = labels

    def __len__(self) -> int:
        return len(next(iter(self._inputs.values())))

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return self._length

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        taken = {name: array[index] for name, array in self._inputs.items()}
        if not self._length or length <= self._length:
            return taken
        missing = [(0, 0), (0, length - self._length)]
        whole = completed(taken, ["attention_mask"])
        return {name: np.pad(array, missing) for name, array in whole.items()}


def read_arrays(
    path: Path,
    source: DataSource,
    inputs: Sequence[str],
    limits: TokenLimits | None,
    name: str,
    problem: Problem = CLASSES,
    outputs: int = 0,
) -> ArrayExamples:
    """Reads model inputs from a NumPy file.

    Args:
        path: The file.
        source: The data source in the recipe; its `label` is the array of labels.
        inputs: Names of the model's inputs, the first of which the file must have.
        limits: The limits of token ids, where there are some.
        name: Name of the examples in error messages.
        problem: The problem that the task's head solves.
        outputs: The number of outputs of that head.

    Raises:
        InputError: The file cannot be read, lacks an array, holds no examples, or numbers that are
            no inputs of the model.
    """
    if not path.is_file():
        raise InputError(f"{name}: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # NumPy's own, zipfile's, zlib's and OS errors
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: {path} is no readable .npz file ({reason})") from error
    # NumPy returns the bytes of what does not begin as an array.
    if damaged := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise InputError(f"{name}: {path} holds {damaged[0]!r}, which is no array; save it again")
    chosen = {key: array for key, array in arrays.items() if key in inputs}
    if inputs[0] not in chosen:
        raise InputError(
            f"{name}: {path} has no array {inputs[0]!r}; its arrays are {', '.join(arrays)}"
        )
    if source.label and source.label not in arrays:
        raise InputError(f"{name}: {path} has no array {source.label!r} for the labels")
    labels = arrays[source.label] if source.label else None
    examples = examples_of_arrays(chosen, path, name, () if labels is None else (labels,))
    _require_values(chosen, limits, f"{name}: {path}")
    if "attention_mask" in chosen:
        chosen["attention_mask"] = chosen["attention_mask"].astype(np.int32)
    if labels is not None and source.label and problem in (NUMBERS, LABELS):
        rows = range(len(labels))
        column = LabelColumn(labels.tolist(), rows, source.label, f"{name}: {path}")
        give_labels(examples, column, problem, outputs)
    elif labels is not None:
        examples.labels = class_indices(labels.tolist(), range(len(labels)), source, name)
    return examples


def _require_values(
    inputs: Mapping[str, np.ndarray], limits: TokenLimits | None, where: str
) -> None:
    """Refuses numbers that the model cannot read."""
    for key, array in inputs.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"{where}: {key} holds {array.dtype}, expected numbers")
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32))
            if not finite.all():
                row = np.argwhere(~finite)[0][0]
                raise InputError(
                    f"{where}: {key}, row {row} holds a number that is NaN or infinite in float32"
                )
    if "attention_mask" in inputs:
        require_mask(inputs["attention_mask"], where)
    if limits is not None:
        limits.require(inputs["input_ids"], where)
        if "token_type_ids" in inputs:
            limits.require_types(inputs["token_type_ids"], where)


def examples_of_arrays(
    inputs: dict[str, np.ndarray], path: Path, name: str, others: Sequence[np.ndarray] = ()
) -> ArrayExamples:
    """Makes examples of the arrays of a NumPy file.

    Args:
        inputs: The model's inputs among them; only shapes are looked at.
        path: The file.
        name: Name of the examples in error messages.
        others: Further arrays that must have as many rows.

    Raises:
        InputError: There is no example, the arrays differ in their number, or texts in their
            number of tokens.
    """
    sizes = {array.shape[:1] for array in (*inputs.values(), *others)}
    if len(sizes) != 1 or sizes == {()}:
        raise InputError(f"{name}: the arrays of {path} differ in their number of examples")
    if sizes == {(0,)}:
        raise InputError(f"{name}: {path} has no examples")
    try:
        return ArrayExamples(inputs)
    except InputError as error:
        raise InputError(f"{name}: {path}: {error}") from error
