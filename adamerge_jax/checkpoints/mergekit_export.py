"""Writing a merge as a config of mergekit (https://github.com/arcee-ai/mergekit), a YAML file.

mergekit's `task_arithmetic` is `theta_base + sum_k w_k (theta_k - theta_base)`, with a weight for
each model that may depend on the tensor's name: a list of `{filter, value}`, of which the first
one counts whose filter is a part of the name. So it can express one coefficient per tensor.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.peft import Expert, MatchedAdapter
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.writing import write_whole


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
        revisions: Revisions of the models that are on the Hub, by task, or `base`.
        dtype: The dtype of the merged tensors; by default the base's.

    Raises:
        InputError: mergekit cannot make it, or the file exists or cannot be written.
    """
    if file.exists():
        raise InputError(f"{file} exists; choose another file, or remove it first")
    # All tensors that mergekit merges, so that no filter changes one that has it as a part.
    parameters = {tensor: name for name, tensor in base.names.items()}
    parameters |= {tensor: tensor for tensor in base.extra} | base.copies
    references = {"base": _reference(base, revisions.get("base"))}
    for task, expert in experts.items():
        if isinstance(expert, MatchedAdapter):
            raise inexpressible(
                f"expert {task!r} is an adapter; build it out with PEFT's merge_and_unload()"
            )
        _require_same_names(base, expert)
        # A tensor that one model has twice is merged twice, with the embeddings of the others.
        parameters |= expert.copies
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
                            tensor: float(weights.get(name, zeros)[position])
                            for tensor, name in parameters.items()
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
        write_whole(file, yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise InputError(f"cannot write {file}: {in_one_line(error)}") from error


def inexpressible(reason: str) -> InputError:
    """Returns the error of a merge that mergekit cannot make."""
    return InputError(f"mergekit cannot make this merge: {reason}")


def _reference(model: MatchedCheckpoint, revision: str | None) -> Any:
    """Returns mergekit's name of a model: a path or `name@revision`, or fields if ambiguous."""
    source = model.checkpoint.source
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    if "+" in source or "@" in source:
        return {"model": {"path": source} | ({"revision": revision} if revision else {})}
    return f"{source}@{revision}" if revision else source


def _require_same_names(base: MatchedCheckpoint, expert: MatchedCheckpoint) -> None:
    """Refuses models with different tensors: mergekit reads all by one list of names."""
    base_names = {*base.names.values(), *base.extra}
    expert_names = {*expert.names.values(), *expert.extra}
    for lacking, names in ((base, expert_names - base_names), (expert, base_names - expert_names)):
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
    """Returns weights by tensor name as a setting: the most frequent one last, without a filter.

    A name that is a part of another comes after it, so that the first filter that is a part of a
    name is that name.
    """
    usual = Counter(weights.values()).most_common(1)[0][0]
    unusual = [name for name, weight in weights.items() if weight != usual]
    caught = [
        name
        for name, weight in weights.items()
        if weight == usual and any(part in name for part in unusual)
    ]
    if not unusual:
        return usual
    ordered = sorted([*unusual, *caught], key=len, reverse=True)
    return [{"filter": name, "value": weights[name]} for name in ordered] + [{"value": usual}]
