"""Reading the weights of a mergekit config (https://github.com/arcee-ai/mergekit)."""

import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.finite import LARGEST, sum_of_squares
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.errors import InputError
from adamerge_jax.files.strict_yaml import read_yaml_file
from adamerge_jax.parameter_names import numbered_block

SMALLEST_SUM = 1e-8
"""The smallest sum of weights that mergekit divides by.

Below it, `task_arithmetic` divides by 1 and `linear` fails.
"""


def read_weights(
    file: Path, base: MatchedCheckpoint, experts: Mapping[str, Expert]
) -> dict[str, Float[np.ndarray, " K"]]:
    """Reads the weights of a mergekit file as merge coefficients.

    Args:
        file: A config with `merge_method: task_arithmetic` or `linear` and `models`: the base and
            the experts under the same paths or Hub names. Relative paths start at the file's
            folder. For `linear`, a `base_model` is one of the models, listed or not.
        base: The base.
        experts: The K experts by task.

    Returns:
        K coefficients for every parameter of the base, by name without `*`.

    Raises:
        InputError: It is no such file, is of other models, or its merge has no coefficients.
    """
    config = read_config(file)
    method = config.get("merge_method")
    if method not in ("task_arithmetic", "linear"):
        raise InputError(
            f"{file}: merge_method is {method!r}; only task_arithmetic and linear have weights "
            "that are coefficients"
        )
    if not isinstance(config.get("models"), list):
        raise InputError(f"{file}: has no list of models; slices and modules are not read")
    if method == "task_arithmetic" and not _is_model(config.get("base_model"), base, file):
        raise InputError(
            f"{file}: base_model is {config.get('base_model')!r}, the base is "
            f"{base.checkpoint.source}"
        )
    shared = _parameters(config, f"{file}: ")
    by_role = _parameters_by_role(config, base, experts, file)
    depths = _depths(base.names)
    weights = {}
    for name, tensor in base.names.items():
        settings = _TensorSettings(file, tensor, depths[name], shared, by_role)
        values = np.array([settings.weight(task) for task in experts])
        normalize = _linear if method == "linear" else _task_arithmetic
        with np.errstate(over="ignore", invalid="ignore"):
            coefficients = normalize(values, settings).astype(np.float32)
        if not np.isfinite(sum_of_squares(coefficients)):
            raise InputError(
                f"{file}: the weights of {name} are {np.array2string(values, threshold=8)}, which "
                "are no coefficients that are finite in float32; write smaller ones"
            )
        weights[name] = coefficients
    return weights


@dataclass(frozen=True)
class _TensorSettings:
    """The settings of a config for one tensor.

    Attributes:
        file: The config, for messages.
        tensor: The name of the tensor.
        depth: The depth of the tensor in its stack, from 0 to 1.
        shared: Parameters of all models.
        by_role: Parameters of each model.
    """

    file: Path
    tensor: str
    depth: float
    shared: Mapping[str, Any]
    by_role: Mapping[str, Mapping[str, Any]]

    def shared_value(self, key: str, default: Any) -> Any:
        """Returns a parameter of all models, the default if it has no value for the tensor."""
        value = None
        if key in self.shared:
            where = f"{self.file}: parameters.{key}"
            value = _resolve(self.shared[key], self.tensor, self.depth, where)
        return default if value is None else value

    def weight(self, role: str) -> float:
        """Returns the weight of a model, its own or that of all models."""
        value = None
        if "weight" in self.by_role[role]:
            where = f"{self.file}: weight of {role}"
            value = _resolve(self.by_role[role]["weight"], self.tensor, self.depth, where)
        if value is None:
            value = self.shared_value("weight", None)
        if value is None:
            raise InputError(f"{self.file}: {role} has no weight for {self.tensor}")
        return float(value)


def _linear(values: Float[np.ndarray, " K"], settings: _TensorSettings) -> Float[np.ndarray, " K"]:
    """Returns the coefficients of `linear`: the experts' shares in the sum of all weights."""
    total = values.sum()
    total += settings.weight("base") if "base" in settings.by_role else 0.0
    if not settings.shared_value("normalize", True) and not np.isclose(total, 1):
        raise InputError(
            f"{settings.file}: the weights of {settings.tensor} sum to {total:g}; without "
            "normalize only weights of base and experts that sum to 1 are coefficients"
        )
    if abs(total) < SMALLEST_SUM:
        raise InputError(
            f"{settings.file}: the weights of {settings.tensor} sum to {total:g}, and linear "
            "divides by their sum; choose others, or task_arithmetic"
        )
    return values / total


def _task_arithmetic(
    values: Float[np.ndarray, " K"], settings: _TensorSettings
) -> Float[np.ndarray, " K"]:
    """Returns the coefficients of `task_arithmetic`: the weights, normalised on demand."""
    total = values.sum()
    if settings.shared_value("normalize", False) and abs(total) >= SMALLEST_SUM:
        values = values / total
    return values * float(settings.shared_value("lambda", 1.0))


def _parameters_by_role(
    config: Mapping[str, Any], base: MatchedCheckpoint, experts: Mapping[str, Expert], file: Path
) -> dict[str, Mapping[str, Any]]:
    """Returns the parameters of each model of a config, by task, or `base`."""
    roles = {"base": base, **experts}
    by_role: dict[str, Mapping[str, Any]] = {}
    for position, entry in enumerate(config["models"]):
        model = entry.get("model") if isinstance(entry, dict) else None
        role = _role(model, roles, file, f"models.{position}")
        if role in by_role:
            raise InputError(
                f"{file}: models.{position} is {model!r}, which is in the list already; list every "
                "model once"
            )
        by_role[role] = _parameters(entry, f"{file}: models.{position}.")
    if config["merge_method"] == "linear" and config.get("base_model") is not None:
        role = _role(config["base_model"], roles, file, "base_model")
        if role not in by_role and "weight" not in _parameters(config, f"{file}: "):
            raise InputError(
                f"{file}: linear merges base_model too, and it has no weight; list it among the "
                "models with one, or leave base_model out"
            )
        by_role.setdefault(role, {})
    if missing := [task for task in experts if task not in by_role]:
        raise InputError(
            f"{file}: has no model for expert {missing[0]!r} "
            f"({experts[missing[0]].checkpoint.source})"
        )
    return by_role


def read_config(file: Path) -> dict[str, Any]:
    """Reads a mergekit file.

    Raises:
        InputError: It is no such file.
    """
    config = read_yaml_file(file)
    if not isinstance(config, dict) or "merge_method" not in config:
        raise InputError(f"{file} is no mergekit config: it has no merge_method")
    return config


def _parameters(owner: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns the parameters of a config or of one of its models."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError(
            f"{where}parameters is {parameters!r}; write names with values, as in "
            "parameters: {weight: 0.5}"
        )
    return parameters


def _role(reference: Any, roles: Mapping[str, Expert], file: Path, where: str) -> str:
    """Returns the role of the model that a config refers to."""
    for role, model in roles.items():
        if _is_model(reference, model, file):
            return role
    raise InputError(f"{file}: {where} is {reference!r}, which is neither the base nor an expert")


def _is_model(reference: Any, model: Expert, file: Path) -> bool:
    """Returns True if a reference of a config is to the given model."""
    if isinstance(reference, dict):
        if reference.get("lora"):
            raise InputError(
                f"{file}: the model {reference!r} has a lora, and models with one are not read; "
                "write an expert by its own path or Hub name, as the recipe does"
            )
        reference = reference.get("model", reference)
    path = reference.get("path") if isinstance(reference, dict) else reference
    if not isinstance(path, str):
        return False
    local = file.parent / Path(path).expanduser()
    if local.is_dir():
        return local.resolve() == model.checkpoint.folder.resolve()
    name, _, revision = path.partition("@")
    # The name of a lora follows a +.
    return name == model.checkpoint.source and "+" not in revision


def _depths(names: Iterable[str]) -> dict[str, float]:
    """Returns the depth of each tensor in its stack, from 0 to 1; a single layer is at 1."""
    stacks: dict[str, set[int]] = {}
    places = {}
    depths = dict.fromkeys(names, 0.0)
    for name in depths:
        stack, _, number = numbered_block(name).rpartition(".")
        if number:
            places[name] = (stack, int(number))
            stacks.setdefault(stack, set()).add(int(number))
    for name, (stack, number) in places.items():
        layers = len(stacks[stack])
        depths[name] = number / (layers - 1) if layers > 1 else 1.0
    return depths


def _resolve(setting: Any, name: str, depth: float, where: str) -> Any:
    """Returns the value of a setting for one tensor, or None if no filter fits it.

    A list of numbers is a piecewise linear function of the depth.
    """
    value = number_if_it_is(setting)
    if isinstance(setting, list) and setting:
        if all(isinstance(entry, (int, float)) for entry in setting):
            for entry in setting:
                _require_finite(entry, where)
            value = float(np.interp(depth, np.linspace(0, 1, len(setting)), setting))
        elif all(isinstance(entry, dict) and "value" in entry for entry in setting):
            for entry in setting:
                part = entry.get("filter")
                if part is not None and not isinstance(part, str):
                    raise InputError(
                        f"{where}: filter is {part!r}; write a part of tensors' names, in quotes "
                        "if it is a number"
                    )
                if part in (None, "*") or part in name:
                    return _resolve(entry["value"], name, depth, where)
            return None
    if not isinstance(value, (bool, int, float)):
        raise InputError(
            f"{where}: {reprlib.repr(setting)} is no number, list of numbers or list of filters "
            "with values"
        )
    _require_finite(value, where)
    return value


def number_if_it_is(setting: Any) -> Any:
    """Returns the number that a text stands for, such as 1e-3 in YAML 1.1; all else as it is."""
    if isinstance(setting, str):
        with suppress(ValueError):
            return float(setting)
    return setting


def _require_finite(value: float, where: str) -> None:
    """Refuses a number that float32 cannot hold."""
    if not abs(value) <= LARGEST:
        raise InputError(
            f"{where}: {reprlib.repr(value)} is not finite in float32; write finite numbers"
        )
