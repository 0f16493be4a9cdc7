"""From a mergekit file to the models of a recipe, and the method that makes the same merge."""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adamerge_jax.checkpoints.dtypes import DTYPES
from adamerge_jax.checkpoints.mergekit import SMALLEST_SUM, number_if_it_is, read_config
from adamerge_jax.errors import InputError
from adamerge_jax.report.plain_text import one_line

_READ = ("task_arithmetic", "linear", "ties", "dare_linear", "breadcrumbs", "sce")
"""The methods of mergekit that have a counterpart here."""

_WITH_WEIGHTS = ("task_arithmetic", "linear")
"""Methods whose weights may differ: they are coefficients that learning can start from."""

_AS_STEPS = {
    "dare_ties": "drop_and_rescale and elect_sign",
    "breadcrumbs_ties": "drop_extremes and elect_sign",
}
"""Methods that are interference steps before learning here, and the steps."""

_FIELDS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name")
"""Fields that are read, or that say nothing of the merge."""


class MergekitFile(NamedTuple):
    """What a mergekit file merges, and how.

    Attributes:
        base: The base's folder, or its name on the Hub.
        experts: Those of the experts.
        method: The method that makes the same merge; None where weights differ, so that learning
            is to start from them.
        options: The options of the method.
        dtype: The dtype of the merge; None where the file names none.
        notes: Sentences on what is not the same here.
    """

    base: str
    experts: list[str]
    method: str | None
    options: dict[str, float]
    dtype: str | None
    notes: list[str]


def read_mergekit_file(file: Path) -> MergekitFile:
    """Reads a mergekit file with `models`.

    Args:
        file: The file. Models whose paths are folders are looked for beside it.

    Raises:
        InputError: It is no such file, or there is no method here that makes its merge.
    """
    config = read_config(file)
    name = config["merge_method"]
    if isinstance(name, str) and name in _AS_STEPS:
        raise InputError(
            f"{file}: merge_method is {name}, which is no single method here; write a recipe with "
            f"`adamerge new` and take the interference steps {_AS_STEPS[name]}"
        )
    if name not in _READ:
        raise InputError(
            f"{file}: merge_method is {reprlib.repr(name)}; these are read: {', '.join(_READ)}"
        )
    models = config.get("models")
    if not isinstance(models, list) or not models:
        raise InputError(f"{file}: has no list of models; slices and modules are not read")
    if config.get("base_model") is None:
        raise InputError(
            f"{file}: names no base_model; add the model that the experts were fine-tuned from"
        )
    base = _model(config["base_model"], file, "base_model")
    settings = {base: _Settings(file, "base_model", {})}
    for position, entry in enumerate(models):
        where = f"models.{position}"
        if not isinstance(entry, dict) or "model" not in entry:
            raise InputError(f"{file}: {where} is {reprlib.repr(entry)}; expected model: PATH")
        model = _model(entry["model"], file, f"{where}.model", base)
        if model in settings and model != base:
            raise InputError(f"{file}: {where} is in the list already; list every model once")
        settings[model] = _Settings(file, where, _section(entry, file, where))
    shared = _Settings(file, "", _section(config, file, ""))
    experts = [model for model in settings if model != base]
    if not experts:
        raise InputError(f"{file}: models has no model but base_model; list the experts")
    of_experts = [settings[model] for model in experts]
    method, options, notes = _METHODS[name](of_experts, settings[base], shared)
    if unread := [field for field in config if field not in _FIELDS]:
        notes.append(f"not taken over: {', '.join(map(one_line, unread))}")
    return MergekitFile(base, experts, method, options, _dtype(config, file), notes)


class _Settings(NamedTuple):
    """The parameters of a config or of one of its models.

    Attributes:
        file: The config, for messages.
        where: The place of the parameters in it.
        values: The parameters.
    """

    file: Path
    where: str
    values: Mapping[str, Any]

    def number(self, key: str, shared: "_Settings", default: float | None = None) -> float | None:
        """Returns a parameter that is one number, its own or that of all models, or the default.

        Raises:
            InputError: It is no finite number, or one for each tensor.
        """
        owner = self if key in self.values else shared
        value = number_if_it_is(owner.values.get(key))
        place = ".".join(filter(None, (owner.where, "parameters", key)))
        if isinstance(value, list):
            raise InputError(
                f"{self.file}: {place} differs by tensor, and the method here has one number; "
                "write one"
            )
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{self.file}: {place} is {reprlib.repr(value)}; expected a number")
        if not math.isfinite(value):
            raise InputError(f"{self.file}: {place} is {value}; expected a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a parameter that is true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            place = f"parameters.{key}"
            raise InputError(
                f"{self.file}: {place} is {reprlib.repr(value)}; expected true or false"
            )
        return value


_Method = tuple[str | None, dict[str, float], list[str]]

_LEARNS = (
    "the weights differ by model or tensor: learning starts from them, and no single method makes "
    "the same merge"
)


def _differ(experts: list[_Settings], shared: _Settings) -> bool:
    """Returns True if experts have several weights, or one has several."""
    weights = [settings.values.get("weight", shared.values.get("weight")) for settings in experts]
    return any(isinstance(weight, list) or weight != weights[0] for weight in weights)


def _common(
    experts: list[_Settings], shared: _Settings, key: str, default: float | None = None
) -> float:
    """Returns the number that all experts have."""
    values = [settings.number(key, shared, default) for settings in experts]
    file = shared.file
    if values[0] is None:
        raise InputError(f"{file}: {experts[0].where} has no {key}; give it one")
    if any(value != values[0] for value in values):
        raise InputError(
            f"{file}: {key} differs by model, and the method here has one number for all; write "
            "one, or learn the coefficients"
        )
    return values[0]


def _task_arithmetic(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    if _differ(experts, shared):
        return None, {}, [_LEARNS]
    weight = _common(experts, shared, "weight")
    if shared.flag("normalize", False) and abs(len(experts) * weight) >= SMALLEST_SUM:
        weight = 1 / len(experts)
    return "task_arithmetic", {"coefficient": weight * _scale(shared)}, []


def _linear(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    if _differ(experts, shared):
        return None, {}, [_LEARNS]
    weight, of_base = _common(experts, shared, "weight"), base.number("weight", shared)
    if of_base is None:
        raise InputError(
            f"{shared.file}: linear merges base_model too, and it has no weight; list it among the "
            "models with one, 0 to leave it out"
        )
    total = len(experts) * weight + of_base
    if shared.flag("normalize", True):
        if abs(total) < SMALLEST_SUM:
            raise InputError(f"{shared.file}: the weights sum to {total:g}; choose others")
        weight /= total
    elif not math.isclose(total, 1):
        raise InputError(
            f"{shared.file}: the weights sum to {total:g}; without normalize only weights that "
            "sum to 1 are a merge of this kind"
        )
    return "task_arithmetic", {"coefficient": weight}, []


def _ties(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    _common(experts, shared, "weight")
    if not shared.flag("normalize", True):
        raise InputError(
            f"{shared.file}: parameters.normalize is false, and ties here is always a mean; write "
            "true"
        )
    density = _common(experts, shared, "density", 1.0)
    options = {"coefficient": _scale(shared), "density": density}
    note = "ties keeps the largest entries of the whole model here, mergekit those of each tensor"
    return "ties", options, [note]


def _dare(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    _refuse_normalize(shared)
    if not shared.flag("rescale", True):
        raise InputError(
            f"{shared.file}: parameters.rescale is false, and dare here always rescales; write true"
        )
    drop = 1 - _common(experts, shared, "density", 1.0)
    weight = _common(experts, shared, "weight")
    options = {"coefficient": weight * _scale(shared), "drop": round(drop, 12)}
    note = (
        "dare draws other entries, and divides those that stay by their part; mergekit restores "
        "the sum of magnitudes"
    )
    return "dare", options, [note]


def _breadcrumbs(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    _refuse_normalize(shared)
    density = _common(experts, shared, "density", 1.0)
    largest = _common(experts, shared, "gamma", 0.01)
    options = {
        "coefficient": _common(experts, shared, "weight") * _scale(shared),
        "smallest": round(max(1 - density - largest, 0.0), 12),
        "largest": largest,
    }
    return "breadcrumbs", options, []


def _sce(experts: list[_Settings], base: _Settings, shared: _Settings) -> _Method:
    return "sce", {"density": _of_all(shared, "select_topk", 1.0)}, []


_METHODS = {
    "task_arithmetic": _task_arithmetic,
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare,
    "breadcrumbs": _breadcrumbs,
    "sce": _sce,
}


def _of_all(shared: _Settings, key: str, default: float) -> float:
    """Returns a number that is the same for all models."""
    return _common([shared], shared, key, default)


def _scale(shared: _Settings) -> float:
    """Returns `lambda`, by which sums of task vectors are scaled."""
    return _of_all(shared, "lambda", 1.0)


def _refuse_normalize(shared: _Settings) -> None:
    if shared.flag("normalize", False):
        raise InputError(
            f"{shared.file}: parameters.normalize is true, and the method here is a sum; leave it "
            "out, and divide the weights by their sum"
        )


def _section(owner: Mapping[str, Any], file: Path, where: str) -> Mapping[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        place = ".".join(filter(None, (where, "parameters")))
        raise InputError(
            f"{file}: {place} is {reprlib.repr(parameters)}; expected names with values"
        )
    return parameters


def _model(reference: Any, file: Path, where: str, base: str | None = None) -> str:
    """Returns the folder or the name of a model; of an adapter on the base, that of the adapter."""
    if isinstance(reference, dict):
        inner = reference.get("model", reference)
        fields = inner if isinstance(inner, dict) else {"path": inner}
        path, revision = fields.get("path"), fields.get("revision")
        if reference.get("lora"):
            raise InputError(
                f"{file}: {where} has a lora as a section; write MODEL+ADAPTER in one text"
            )
        reference = f"{path}@{revision}" if isinstance(path, str) and revision else path
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(f"{file}: {where} is {reprlib.repr(reference)}; expected a path or a name")
    model, plus, adapter = reference.partition("+")
    if plus:
        if base is None or _found(model, file) != base:
            raise InputError(
                f"{file}: {where} is {reprlib.repr(reference)}, an adapter of another model than "
                "base_model; experts are adapters of the base, or whole models"
            )
        model = adapter
    return _found(model, file)


def _found(path: str, file: Path) -> str:
    beside = file.parent / Path(path).expanduser()
    return str(beside) if beside.exists() else path


def _dtype(config: Mapping[str, Any], file: Path) -> str | None:
    field = "out_dtype" if config.get("out_dtype") is not None else "dtype"
    dtype = config.get(field)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(
            f"{file}: {field} is {reprlib.repr(dtype)}; expected one of {', '.join(DTYPES)}"
        )
    return dtype
