"""The result of `merge`: the merged model, its coefficients, and how they were learned."""

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import numpy as np
import yaml
from jaxtyping import Array

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.files.writing import write_whole
from adamerge_jax.own_model.leaves import Model
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    RESULTS_FILE,
)
from adamerge_jax.runs.folder import StepRecord
from adamerge_jax.runs.predictions import Predictions, write_predictions
from adamerge_jax.runs.results import Results, write_results

_FILES = {RECIPE_FILE, METRICS_FILE, COEFFICIENTS_FILE, RECORD_FILE}
"""The files by which a folder is known to be of a merge, and may be written anew."""


@dataclasses.dataclass(frozen=True, repr=False)
class Merged(Generic[Model]):
    """A merge that was learned.

    Attributes:
        coefficients: The learned coefficients, `[K, ...]` by group, with all that `fold` needs.
        stages: The numbers of every step, of each run of the learning loop.
        recipe: The fields of a recipe by which it was learned.
        record: Facts such as the number of examples and the time it took.
        arrays: All arrays of the merge by name, `[*shape]`.
        heads: The parameters that each task keeps for itself, by task and name.
        rebuild: From arrays by name to a model like the base.
        results: The table of accuracies on test data, and what the merge reaches; None without.
        predictions: The classes that the merge takes for others on test data, by task.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import adamerge_jax as am
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> experts = [{"kernel": jnp.eye(2)}, {"kernel": -jnp.eye(2)}]
        >>> data = [np.ones((20, 2), np.float32)] * 2
        >>> def forward(parameters, inputs):
        ...     return inputs @ parameters["kernel"]
        >>> merged = am.merge(base, experts, forward, data, steps=2, progress=False)
        >>> merged.parameters["kernel"].shape
        (2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = merged.save(Path(folder) / "coefficients.safetensors")
        ...     am.Coefficients.load(file).names
        ('expert_0', 'expert_1')
    """

    coefficients: Coefficients
    stages: Sequence[Sequence[StepRecord]]
    recipe: Recipe
    record: Mapping[str, Any]
    arrays: Mapping[str, Array]
    heads: Mapping[str, Mapping[str, Array]]
    rebuild: Callable[[Mapping[str, Array]], Model]
    results: Results | None = None
    predictions: Predictions = dataclasses.field(default_factory=dict)

    @cached_property
    def parameters(self) -> Model:
        """The merge, a model like the base; what tasks keep for themselves is the base's."""
        return self.rebuild(self.arrays)

    def for_task(self, task: str) -> Model:
        """Returns the merge with the parameters that a task keeps for itself.

        Raises:
            InputError: There is no such task.
        """
        if task not in self.heads:
            raise InputError(f"task: there is no {task!r}; the tasks are {', '.join(self.heads)}")
        return self.rebuild({**self.arrays, **self.heads[task]})

    def save(self, path: Path | str) -> Path:
        """Writes the coefficients file, which `fold`, `start` and the command line read.

        Args:
            path: The file, such as `coefficients.safetensors`.

        Returns:
            The file.
        """
        file = Path(path).expanduser()
        self.coefficients.save(file)
        return file

    def report(self, folder: Path | str) -> Path:
        """Writes a run folder with a page for people: coefficients, learning curves, the cost.

        Args:
            folder: The folder to make, or that of an earlier report.

        Returns:
            The page, which needs no other file.

        Raises:
            InputError: The folder holds something else.
        """
        from adamerge_jax.report.page import write_page

        out = Path(folder).expanduser()
        if out.exists() and not (out.is_dir() and _may_be_written(out)):
            raise InputError(
                f"{out}: holds other files than those of a report; choose a new folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        resolved = self.recipe.model_dump(mode="json")
        write_whole(out / RECIPE_FILE, yaml.safe_dump(resolved, sort_keys=False))
        lines = [json.dumps(step._asdict()) for stage in self.stages for step in stage]
        write_whole(out / METRICS_FILE, "".join(f"{line}\n" for line in lines))
        text = json.dumps(self.record, indent=2, ensure_ascii=False)
        write_whole(out / RECORD_FILE, f"{text}\n")
        self.coefficients.save(out / COEFFICIENTS_FILE)
        for file in (RESULTS_FILE, PREDICTIONS_FILE):  # of an earlier report
            (out / file).unlink(missing_ok=True)
        if self.results is not None:
            write_results(self.results, out / RESULTS_FILE)
            write_predictions(self.predictions, out / PREDICTIONS_FILE)
        return write_page(out)

    def __repr__(self) -> str:
        return f"Merged({self._in_words()})"

    def _in_words(self) -> str:
        from adamerge_jax.report.coefficients import count_coefficients

        coefficients = self.coefficients
        taken = self.stages[-1][-1].step if self.stages and self.stages[-1] else 0
        words = (
            f"{len(coefficients.names)} experts, {count_coefficients(coefficients):,} coefficients "
            f"by {coefficients.granularity}, best after {coefficients.step} of {taken} steps"
        )
        if self.results is not None:
            return f"{words}, {self._accuracies()}"
        agreement = self._agreement()
        return words if agreement is None else f"{words}, held-out agreement {agreement:.1%}"

    def _accuracies(self) -> str:
        """Returns the average accuracies of the base, the merge and the experts, in words."""
        assert self.results is not None
        rows = {row.kind: row.average for row in reversed(self.results.rows)}
        return (
            f"accuracy {rows['learned']:.1%} (base {self.results.rows[0].average:.1%}, experts "
            f"{rows['experts']:.1%})"
        )

    def _agreement(self) -> float | None:
        """Returns the mean held-out agreement over the tasks that have one."""
        steps = self.stages[-1] if self.stages else ()
        best = next((s for s in steps if s.step == self.coefficients.step), None)
        values = [v for v in ((best and best.agreement) or {}).values() if v is not None]
        return float(np.mean(values)) if values else None

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the merge in words and its heat map."""
        from markupsafe import escape

        from adamerge_jax.report.maps import coefficients_figure

        stream = io.BytesIO()
        coefficients_figure(self.coefficients).savefig(stream, format="png", dpi=96)
        picture = base64.b64encode(stream.getvalue()).decode()
        words = escape(self._in_words())
        return (
            f"<p><strong>Merged</strong>: {words}</p>"
            f'<img alt="mean coefficients" src="data:image/png;base64,{picture}">'
        )


def _may_be_written(folder: Path) -> bool:
    """Returns True for an empty folder and for one with all files of a merge."""
    names = {entry.name for entry in folder.iterdir()}
    return not names or names >= _FILES
