"""The model card of a merged checkpoint, in the Hugging Face Hub's format."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from markupsafe import Markup

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.report.coefficients import (
    count_coefficients,
    interference_in_words,
    range_warning,
    scaled_in_words,
    spreads,
)
from adamerge_jax.report.harness import HarnessTable
from adamerge_jax.report.markdown import code_span
from adamerge_jax.report.rendering import render
from adamerge_jax.report.results import TITLES, outcome_in_words, scores_in_words
from adamerge_jax.runs.results import Results

_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    MULTIPLE_CHOICE: "multiple-choice",
    TOKEN_CLASSIFICATION: "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModel": None,  # of any architecture
    "DiffusionPipeline": None,  # of images or films, from texts or images
    "ModelMixin": None,  # a single component of such a pipeline
    None: "zero-shot-image-classification",
}
"""A model's purpose in the Hub's words, by the class that loads it; by None for a CLIP, whose heads
are no part of a checkpoint."""

_READERS = {
    "AutoModelForCausalLM": "AutoTokenizer",
    "AutoModelForSeq2SeqLM": "AutoTokenizer",
    "AutoModelForImageTextToText": "AutoProcessor",
}
"""The class that loads what reads a model's inputs, of models that are useless without it."""

_OF_DIFFUSERS = {"DiffusionPipeline": "DiffusionPipeline", "ModelMixin": "AutoModel"}
"""Classes of `diffusers`, and those that load them whichever they are."""

_IDENTIFIER = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,95}"
"""Names that the Hub's metadata can have: those of licences, and the parts of ids."""


class Origin(NamedTuple):
    """A model that a merge was made of.

    Attributes:
        name: `base`, or the task of an expert.
        source: The folder or Hub id as the recipe gives it.
        revision: The Hub revision asked for, if any.
        on_hub: True for a Hub id.
        license: The licence that its own model card names, or None where none is named.
    """

    name: str
    source: str
    revision: str | None
    on_hub: bool
    license: str | None

    @property
    def hub_id(self) -> str | None:
        """The id on the Hub; None for a folder, and for a source that no id can look like."""
        return self.source if self.on_hub and _is_hub_id(self.source) else None


def model_card(
    coefficients: Coefficients | None,
    results: Results | None,
    task_folders: Sequence[str],
    *,
    origins: Sequence[Origin],
    auto_class: str | None,
    datasets: Sequence[str] = (),
    method: str = "",
    account: Sequence[str] = (),
    embeds: bool = False,
    auto_classes: Mapping[str, str | None] = MappingProxyType({}),
) -> str:
    """Returns a README.md for the merged checkpoint: metadata for the Hub, then text for readers.

    Nothing is claimed that was not found: a licence only where every model names the same. Names,
    licences and other texts of strangers are shown as the text that they are, and are metadata only
    where they are identifiers.

    Args:
        coefficients: The learned coefficients; None for a method that has none.
        results: The table of results, the merge last, and the outcome; None without test data.
        task_folders: Tasks that have a model of their own beside the checkpoint.
        origins: The origins of the base and of the experts, in this order.
        datasets: Hub ids of the calibration data.
        auto_class: Name of the class that loads the model of a task; None for zero-shot CLIP.
        method: The merge method with its options, where there are no coefficients.
        account: Lines that say what became of the base's tensors.
        embeds: True for a sentence embedder.
        auto_classes: The class that loads the model of each task, where they are of several.
    """
    if coefficients is not None and coefficients.is_searched:
        datasets = ()  # its calibration data was not looked at
    library = "sentence-transformers" if embeds else "transformers"
    if auto_class in _OF_DIFFUSERS:
        library = "diffusers"
    on_hub = list(dict.fromkeys(origin.hub_id for origin in origins if origin.hub_id))
    fields: dict[str, Any] = {
        "base_model": on_hub or None,
        "base_model_relation": "merge" if on_hub else None,
        "library_name": library,
        "license": shared_license(origins),
        "tags": ["merge", "adamerge_jax", *(["sentence-transformers"] if embeds else [])],
        "datasets": [dataset for dataset in datasets if _is_hub_id(dataset)] or None,
        "pipeline_tag": "sentence-similarity" if embeds else _PIPELINES[auto_class],
    }
    if fields["license"] == "other":
        fields["license_name"] = _license_name(origins)
    data = ModelCardData(**{name: value for name, value in fields.items() if value is not None})
    results = results or Results([])
    text = render(
        "model_card.md.jinja",
        coefficients=coefficients,
        method=method,
        account=account,
        **_coefficients_in_words(coefficients),
        base=origins[0],
        experts=origins[1:],
        origins=origins,
        license=fields["license"],
        datasets=datasets,
        auto_class=_OF_DIFFUSERS.get(auto_class, auto_class or "AutoModel"),
        library=library,
        embeds=embeds,
        reader=_READERS.get(auto_class or ""),
        task_folders=task_folders,
        other_classes=_other_classes(task_folders, auto_classes),
        tables=[_table_in_words(table) for table in results.tables],
        harness=None if results.harness is None else HarnessTable.of(results.harness),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _other_classes(
    tasks: Sequence[str], auto_classes: Mapping[str, str | None]
) -> dict[str, list[str]]:
    """Returns the tasks whose models another class loads than the first one's, by that class."""
    first, *others = tasks or [""]
    classes: dict[str, list[str]] = {}
    for task in others:
        name = auto_classes.get(task)
        if name is not None and name != auto_classes.get(first):
            classes.setdefault(name, []).append(task)
    return classes


def shared_license(origins: Sequence[Origin]) -> str | None:
    """Returns the licence of all the models together, as the Hub names licences.

    That is theirs where all name the same; `other` where they name different ones, or something
    that is no identifier; None where one names none: the licence of the merge is then for its owner
    to find out.
    """
    licenses = {origin.license for origin in origins}
    if None in licenses:
        return None
    return licenses.pop() if len(licenses) == 1 and _license_name(origins) else "other"


def _table_in_words(results: Results) -> dict[str, Any]:
    """Returns the template's values of a table of results."""
    rows, outcome = results.rows, results.outcome
    return {
        "title": TITLES[rows[0].metric],
        "tasks": list(rows[0].tasks),
        "rows": [(row.method, scores_in_words(row)) for row in rows],
        "outcome": Markup(outcome_in_words(outcome, rows[-1].metric, name=code_span)),
    }


def _license_name(origins: Sequence[Origin]) -> str | None:
    """Returns the name of all licences together; None if one of them is no identifier."""
    names = dict.fromkeys(str(origin.license) for origin in origins)
    if not all(re.fullmatch(_IDENTIFIER, name) for name in names):
        return None
    return "-and-".join(names)


def _is_hub_id(source: str) -> bool:
    """Returns True for a name, or an owner and a name, of characters that the Hub allows."""
    return re.fullmatch(f"({_IDENTIFIER}/)?{_IDENTIFIER}", source) is not None


def _coefficients_in_words(coefficients: Coefficients | None) -> dict[str, Any]:
    """Returns the template's values that depend on coefficients."""
    if coefficients is None:
        return {}
    return {
        "count": count_coefficients(coefficients),
        "interference": interference_in_words(coefficients),
        "scaled": scaled_in_words(coefficients),
        "spreads": zip(coefficients.experts, spreads(coefficients), strict=True),
        "warning": Markup(range_warning(coefficients, name=code_span) or ""),
    }
