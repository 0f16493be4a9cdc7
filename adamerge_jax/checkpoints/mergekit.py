"""Merges as mergekit (https://github.com/arcee-ai/mergekit) writes them down: a YAML file.

mergekit's `task_arithmetic` is `theta_base + sum_k w_k (theta_k - theta_base)`, with a weight for
each model that may depend on the tensor's name: a list of `{filter, value}`, of which the first
whose filter is a part of the name counts. So it says all that one coefficient per tensor says.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.peft import Expert, MatchedAdapter
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.parameter_names import numbered_block

_SMALLEST_SUM = 1e-8
"""Of weights that mergekit divides by; below, `task_arithmetic` divides by 1, `linear` fails."""


def write_merge(
    file: Path,
    base: MatchedCheckpoint,
    experts: Mapping[str, Expert],
    weights: Mapping[str, Float[np.ndarray, " K"]],
    *,
    revisions: Mapping[str, str | None],
    dtype: str | None,
) -> None:
    """Writes the YAML file with which mergekit makes the same merge.

    Args:
        file: The file to make.
        base: The base.
        experts: The K experts by task.
        weights: The coefficients of every merged parameter; all others stay the base's.
        revisions: Of those models that are on the Hub: by task, or `base`.
        dtype: Of the merged tensors; by default the base's.

    Raises:
        InputError: mergekit cannot make it, or the file exists or cannot be written.
    """
    if file.exists():
        raise InputError(f"{file} exists; choose another file, or remove it first")
    # Every tensor that it merges, so that a filter that is a part of another name changes none.
    in_file = {own: name for name, own in base.names.items()} | {own: own for own in base.extra}
    in_file |= base.copies
    references = {"base": _reference(base, revisions.get("base"))}
    for task, expert in experts.items():
        if isinstance(expert, MatchedAdapter):
            raise inexpressible(
                f"expert {task!r} is an adapter; build it out with PEFT's merge_and_unload()"
            )
        _require_same_names(base, expert)
        # What one model has twice, it merges twice; of the others it takes the embeddings again.
        in_file |= expert.copies
        references[task] = _reference(expert, revisions.get(task))
        for other in list(references)[:-1]:
            if references[other] == references[task]:
                raise inexpressible(f"{other!r} and {task!r} are one model to it")
    zeros = np.zeros(len(experts))
    config = {
        "merge_method": "task_arithmetic",
        "base_model": references["base"],
        "models": [
            {
                "model": references[task],
                "parameters": {
                    "weight": _setting(
                        {
                            own: float(weights.get(name, zeros)[position])
                            for own, name in in_file.items()
                        }
                    )
                },
            }
            for position, task in enumerate(experts)
        ],
        # Sums are float32, as ours are.
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": dtype or _only_dtype(base),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {in_one_line(error)}") from error


def read_weights(
    file: Path, base: MatchedCheckpoint, experts: Mapping[str, Expert]
) -> dict[str, Float[np.ndarray, " K"]]:
    """Reads what a mergekit file says of every parameter, as coefficients of ours.

    Args:
        file: A config with `merge_method: task_arithmetic` or `linear` and `models`, which are the
            base and the experts under the same paths or Hub names. Relative paths start at the
            file's folder. To `linear`, a `base_model` is one of the models, listed or not.
        base: The base.
        experts: The K experts by task.

    Returns:
        K coefficients for every parameter of the base, by name without `*`.

    Raises:
        InputError: It is no such file, is of other models, or says what no coefficients can.
    """
    config = _read_config(file)
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
    own = _parameters(config, f"{file}: ")
    roles = {"base": base, **experts}
    found: dict[str, Mapping[str, Any]] = {}
    for position, entry in enumerate(config["models"]):
        model = entry.get("model") if isinstance(entry, dict) else None
        role = _role(model, roles, file, f"models.{position}")
        if role in found:
            raise InputError(
                f"{file}: models.{position} is {model!r}, which is in the list already; list every "
                "model once"
            )
        found[role] = _parameters(entry, f"{file}: models.{position}.")
    if method == "linear" and config.get("base_model") is not None:
        role = _role(config["base_model"], roles, file, "base_model")
        if role not in found and "weight" not in own:
            raise InputError(
                f"{file}: linear merges base_model too, and it has no weight; list it among the "
                "models with one, or leave base_model out"
            )
        found.setdefault(role, {})
    if missing := [task for task in experts if task not in found]:
        raise InputError(
            f"{file}: has no model for expert {missing[0]!r} "
            f"({experts[missing[0]].checkpoint.source})"
        )
    depths = _depths(base.names)
    weights = {}
    for name, in_file in base.names.items():
        place = (in_file, depths[name])

        def setting(key: str, default: object, place: tuple[str, float] = place) -> Any:
            value = None
            if key in own:
                value = _resolve(own[key], *place, f"{file}: parameters.{key}")
            return default if value is None else value

        def weight(role: str, place: tuple[str, float] = place) -> float:
            value = None
            if "weight" in found[role]:
                value = _resolve(found[role]["weight"], *place, f"{file}: weight of {role}")
            if value is None:
                value = setting("weight", None, place)
            if value is None:
                raise InputError(f"{file}: {role} has no weight for {place[0]}")
            return float(value)

        values = np.array([weight(task) for task in experts])
        total = values.sum()
        if method == "linear":
            of_base = weight("base") if "base" in found else 0.0
            total += of_base
            if not setting("normalize", True) and not np.isclose(total, 1):
                raise InputError(
                    f"{file}: the weights of {in_file} sum to {total:g}; without normalize only "
                    "weights of base and experts that sum to 1 are coefficients"
                )
            if abs(total) < _SMALLEST_SUM:
                raise InputError(
                    f"{file}: the weights of {in_file} sum to {total:g}, and linear divides by "
                    "their sum; choose others, or task_arithmetic"
                )
            weights[name] = values / total
            continue
        if setting("normalize", False) and abs(total) >= _SMALLEST_SUM:
            values = values / total
        weights[name] = values * float(setting("lambda", 1.0))
    return {name: values.astype(np.float32) for name, values in weights.items()}


def inexpressible(why: str) -> InputError:
    """Why mergekit cannot make a merge."""
    return InputError(f"mergekit cannot make this merge: {why}")


def _reference(model: MatchedCheckpoint, revision: str | None) -> Any:
    """How mergekit names a model: a path or `name@revision`, in full where that could mislead."""
    source = model.checkpoint.source
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    if "+" in source or "@" in source:
        return {"model": {"path": source} | ({"revision": revision} if revision else {})}
    return f"{source}@{revision}" if revision else source


def _require_same_names(base: MatchedCheckpoint, expert: MatchedCheckpoint) -> None:
    """Mergekit reads all models by one list of names."""
    of_base = {*base.names.values(), *base.extra}
    of_expert = {*expert.names.values(), *expert.extra}
    for lacking, names in ((base, of_expert - of_base), (expert, of_base - of_expert)):
        if names:
            raise inexpressible(
                f"{lacking.role} ({lacking.checkpoint.source}) has no tensor {min(names)!r}, and "
                "all models must have the same; save them all with or without a head"
            )


def _only_dtype(base: MatchedCheckpoint) -> str:
    dtypes = sorted({base.dtype(name).name for name in base.names})
    if len(dtypes) > 1:
        raise inexpressible(
            f"the base has tensors of {' and '.join(dtypes)}, and its merges have one dtype; set "
            "export.dtype"
        )
    return dtypes[0]


def _setting(weights: Mapping[str, float]) -> float | list[dict[str, Any]]:
    """A weight by tensor name: the most frequent one without a filter, the others before it.

    A name that is a part of another comes after that one, so that the first that fits is its own.
    """
    usual = Counter(weights.values()).most_common(1)[0][0]
    other = [name for name, weight in weights.items() if weight != usual]
    caught = [
        name
        for name, weight in weights.items()
        if weight == usual and any(part in name for part in other)
    ]
    if not other:
        return usual
    ordered = sorted([*other, *caught], key=len, reverse=True)
    return [{"filter": name, "value": weights[name]} for name in ordered] + [{"value": usual}]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error
    if not isinstance(config, dict) or "merge_method" not in config:
        raise InputError(f"{file} is no mergekit config: it has no merge_method")
    return config


def _parameters(owner: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The parameters of a config or of one of its models."""
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
    """Which of our models a reference of a config is."""
    for role, model in roles.items():
        if _is_model(reference, model, file):
            return role
    raise InputError(f"{file}: {where} is {reference!r}, which is neither the base nor an expert")


def _is_model(reference: Any, model: Expert, file: Path) -> bool:
    """Whether a reference of a config is one of our models."""
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
    # What follows a + is a lora.
    return name == model.checkpoint.source and "+" not in revision


def _depths(names: Iterable[str]) -> dict[str, float]:
    """How deep in its stack each tensor is, from 0 to 1; a stack of one layer is at 1."""
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
    """The value of a setting for one tensor, or None where no filter fits it.

    A list of numbers is a gradient over the depth of the network, piece by piece linear.
    """
    value = setting
    if isinstance(setting, str):
        # To YAML 1.1, 1e-3 is a text.
        with suppress(ValueError):
            value = float(setting)
    if isinstance(setting, list) and setting:
        if all(isinstance(entry, (int, float)) for entry in setting):
            value = float(np.interp(depth, np.linspace(0, 1, len(setting)), setting))
        elif all(isinstance(entry, dict) and "value" in entry for entry in setting):
            for entry in setting:
                own = entry.get("filter")
                if own is not None and not isinstance(own, str):
                    raise InputError(
                        f"{where}: filter is {own!r}; write a part of tensors' names, in quotes "
                        "if it is a number"
                    )
                if own in (None, "*") or own in name:
                    return _resolve(entry["value"], name, depth, where)
            return None
    if not isinstance(value, (bool, int, float)):
        raise InputError(
            f"{where}: {setting!r} is no number, list of numbers or list of filters with values"
        )
    if not np.isfinite(value):
        raise InputError(f"{where}: {setting!r} is not finite; write finite numbers")
    return value
