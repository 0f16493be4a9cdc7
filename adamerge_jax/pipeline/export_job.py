"""From coefficients to all that the export of their merge needs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.pipeline.export import ExportJob
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.provenance import model_origins
from adamerge_jax.recipes.schema import ExportRecipe
from adamerge_jax.report.model_card import model_card
from adamerge_jax.runs.results import Results


def export_job(
    models: Models,
    coefficients: Coefficients,
    settings: ExportRecipe,
    root: Path,
    account_lines: Sequence[str],
    *,
    tokenizer: str | None = None,
    datasets: Sequence[str] = (),
    results: Results | None = None,
) -> ExportJob:
    """Describes the export of learned coefficients.

    Args:
        models: The base and its experts.
        coefficients: The coefficients of these experts.
        settings: The dtype, the size of files, and the forms that are asked for.
        root: Folder that relative paths of the recipe start from.
        account_lines: The account of the base's tensors, for the model card.
        tokenizer: `base` or the task whose tokenizer the merge takes; None for the first.
        datasets: Hub ids of the calibration data, for the model card.
        results: The table of results and the outcome, for the model card.
    """
    return ExportJob(
        models,
        settings,
        partial(fold, models, coefficients),
        tasks=[task for task in models.experts if task not in coefficients.left_out],
        card=partial(
            model_card,
            None if coefficients.of_method_alone else coefficients,
            results or Results([]),
            method=coefficients.of_method_alone or "",
            origins=model_origins(models, root),
            datasets=datasets,
            account=account_lines,
            auto_class=models.auto_class(next(iter(models.experts))),
            auto_classes={task: models.auto_class(task) for task in models.experts},
            embeds=models.family.embeds is not None,
        ),
        coefficients=coefficients,
        tokenizer=tokenizer,
    )
