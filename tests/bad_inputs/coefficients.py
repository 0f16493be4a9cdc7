"""Coefficients files that are damaged, changed, of other models, or name code."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.bad_inputs.bad import Bad, broken_json, nested, shown, written
from tests.bad_inputs.safetensors_files import is_bad, join, split

FILE = "coefficients.safetensors"
GROUP = "bert.encoder.layer.0.attention.self.query.weight"

FOLD = f"fold recipe.yaml {FILE} --out out"
MERGE = "merge recipe.yaml --method task_arithmetic --out out"
INSPECT = f"inspect {FILE}"
STORED = "initial_merge/"

TRIM = {"name": "trim", "options": {"density": 0.2}, "fitted": [0.1, 0.1]}
TIES = [
    TRIM,
    {"name": "elect_sign", "options": {}, "fitted": None},
    {"name": "disjoint_mean", "options": {}, "fitted": None},
]


def merge_by(
    name: Any, options: Any = None, interference: Any = (), stored: Any = False
) -> dict[str, Any]:
    """Returns the metadata of an initial merge; without options these are none."""
    fields = {"name": name, "options": {} if options is None else options}
    return fields | {"interference": interference, "stored": stored}


NAN, INFINITY = float("nan"), float("inf")

FIELDS: dict[str, list[Any]] = {
    "format": ["adamerge_jax coefficients 2", "adamerge_jax coefficients 99", "another", "", ...],
    "granularity": [
        "tensr",
        "",
        5,
        None,
        [],
        {},
        "os:system",
        "subprocess:Popen",
        "builtins:print",
        "row",
        "x" * 10**5,
        "tests.own_granularity:halves",
        ...,
    ],
    "granularity_options": [{"pieces": 4}, {"a": NAN}, [], "x", 5, None],
    "interference": [
        [{"name": "trim", "options": {"density": 0.2}, "fitted": {GROUP: "garbage"}}],
        [{"name": "trim", "options": {"density": 0.2}, "fitted": "garbage"}],
        [{"name": "trim", "options": {"density": 7}, "fitted": {}}],
        [{"name": "trim", "options": {"wait": 1}, "fitted": {}}],
        [{"name": "trim", "options": {}, "fitted": {GROUP: [NAN, NAN]}}],
        [{"name": "os:system", "options": {}, "fitted": {}}],
        [{"name": "unheard", "options": {}, "fitted": {}}],
        [{}],
        "x",
        {},
        5,
        [5],
        ...,
    ],
    "constraint": ["unheard", 5, None, [], ...],
    "shapes": [
        {},
        [],
        None,
        "x",
        {GROUP: [16, 32]},
        {GROUP: [-32, 32]},
        {GROUP: "x"},
        {GROUP: [10**30, 10**30]},
        {"unheard": [32, 32]},
        {GROUP: [32.5, 32]},
        {GROUP: None},
        {"a\nb": [32]},
        ...,
    ],
    "base": [None, {}, "base", 5, {"name": "base"}, ...],
    "experts": [
        [],
        None,
        {},
        "x",
        [{}],
        [5],
        ...,
        [{"name": "alpha", "source": "alpha", "revision": None, "identity": "sha256:0"}],
        [{"name": "alpha", "source": "alpha", "revision": None, "identity": "sha256:0"}] * 2,
    ],
    "seed": ["x", None, [], 0.5, ...],
    "step": ["x", None, [], -1, 0.5, ...],
    "objective": [5, None, [], ...],
    "scaled": [{"alpha": "x"}, {"alpha": NAN}, [], "x", {"gamma": 1.0}],
    "depths": [
        {"bert.encoder.layer.*": "x"},
        {"bert.encoder.layer.*": -1},
        [],
        "x",
        {"unheard.*": 10**30},
    ],
    "started_from": [5, [], {}],
    "initial_merge": [
        *(
            "x",
            5,
            [],
            {},
            [{}],
            {"name": "average"},
            merge_by(5),
            merge_by(""),
            merge_by("x" * 10**5),
        ),
        *(merge_by("tise"), merge_by("os:system"), merge_by("builtins:print"), merge_by("a\nb")),
        *(merge_by("tests.own_granularity:halves"), merge_by("average", stored="x")),
        *(
            merge_by("average", []),
            merge_by("average", {"a": NAN}),
            merge_by("average", {"wait": 1}),
        ),
        merge_by("task_arithmetic", {"coefficient": 1e30}),
        merge_by("task_arithmetic", {"coefficient": "x"}),
        merge_by("task_arithmetic", {"coefficient": nested()}),
        *(merge_by("ties"), merge_by("ties", interference=TIES[:2]), merge_by("average", {}, TIES)),
        merge_by("ties", {"density": 0.3}, TIES),
        merge_by("ties", interference=[TRIM | {"fitted": None}, *TIES[1:]]),
        merge_by("ties", interference=[TRIM | {"fitted": [0.1]}, *TIES[1:]]),
        merge_by("ties", interference=[TRIM | {"fitted": [NAN, 0.1]}, *TIES[1:]]),
        merge_by("ties", interference=[TRIM | {"name": "os:system"}, *TIES[1:]]),
        *(merge_by("ties", interference="x"), merge_by("ties", interference=[5])),
        *(merge_by("regmean"), merge_by("regmean", stored=True)),  # without its tensors
    ],
}
"""Fields of the metadata, and values that cannot have been written."""


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad coefficients files, to be folded or looked at."""
    content = (suites["text"] / FILE).read_bytes()
    for field, values in FIELDS.items():
        for number, value in enumerate(values):
            name = f"{field}-{number}-{shown(value)}"
            yield Bad(name, _metadata(field, value), command=FOLD)
    for field in ("granularity", "experts", "shapes", "interference", "initial_merge"):
        for name, text in {"deep": nested(), "no-json": "{", "empty": ""}.items():
            yield Bad(f"{field}-{name}", _metadata_text(field, text), command=INSPECT)
            yield Bad(f"{field}-{name}-folded", _metadata_text(field, text), command=FOLD)
    header, values = split(content)
    for name, changed in broken_json(json.dumps(header), generator, 4):
        if name not in ("huge-number", "deep-field"):
            yield Bad(f"header-{name}", written(FILE, join(changed, values)), command=INSPECT)
    for number, place in enumerate(generator.integers(1, len(content), 8)):
        assert is_bad(content, content[:place])
        yield Bad(f"cut-{number}-at-{place}", written(FILE, content[:place]), command=INSPECT)
    for name, edit in _edits():
        yield Bad(name, _values(edit), command=FOLD)
        yield Bad(f"{name}-inspected", _values(edit), command=INSPECT)
    for name, edit in _edits_of_stored():
        yield Bad(f"stored-{name}", _stored(edit), command=FOLD)
        yield Bad(f"stored-{name}-inspected", _stored(edit), command=INSPECT)
    for name, options in {"half": "alpha=0.5", "out": "beta=0"}.items():
        command = f"{FOLD} --scale {options}"
        yield Bad(
            f"initial-merge-{name}",
            _metadata("initial_merge", merge_by("average")),
            command=command,
        )
    for name, options in {
        "nan": "alpha=nan",
        "inf": "alpha=inf",
        "1e39": "alpha=1e39",
        "1e38": "alpha=1e38",
        "unknown": "gamma=1",
        "twice": "alpha=1 alpha=2",
        "word": "alpha=x",
        "none": "alpha",
        "all-left-out": "alpha=0 beta=0",
        "-1e38": "beta=-1e38",
    }.items():
        yield Bad(f"scale-{name}", lambda root: None, command=f"{FOLD} --scale {options}")
    for name, command in {
        "weights": "inspect alpha/model.safetensors",
        "recipe": "inspect recipe.yaml",
        "folder": "inspect base",
        "absent": "inspect none.safetensors",
        "long": f"inspect {'x' * 300}.safetensors",
        "compare-weights": f"compare {FILE} alpha/model.safetensors",
        "compare-absent": f"compare {FILE} none",
        "compare-out": f"compare {FILE} {FILE} --out none/map.png",
        "compare-out-suffix": f"compare {FILE} {FILE} --out map.txt",
        "fold-of-weights": "fold recipe.yaml alpha/model.safetensors --out out",
        "fold-into-a-file": f"fold recipe.yaml {FILE} --out recipe.yaml",
        "fold-into-a-full-folder": f"fold recipe.yaml {FILE} --out base",
        "mergekit-of-weights": "mergekit recipe.yaml alpha/model.safetensors --out m.yaml",
        "evaluate-absent": "evaluate recipe.yaml --checkpoint none/here",
        "evaluate-a-file": "evaluate recipe.yaml --checkpoint recipe.yaml",
        "merge-unknown": "merge recipe.yaml --method unheard --out out",
        "merge-code": "merge recipe.yaml --method os:system --out out",
        "merge-option": "merge recipe.yaml --method ties --options '{wait: 1}' --out out",
        "merge-nan": f"{MERGE} --options '{{coefficient: .nan}}'",
        "merge-huge": f"{MERGE} --options '{{coefficient: 1e39}}'",
    }.items():
        yield Bad(f"command-{name}", lambda root: None, command=command)


def healthy(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields commands that read the file that the bad ones are made of."""
    for name, initial in {
        "by-average": merge_by("average"),
        "by-ties": merge_by("ties", interference=TIES),
    }.items():
        yield Bad(name, _metadata("initial_merge", initial), command=FOLD)
        yield Bad(f"{name}-inspected", _metadata("initial_merge", initial), command=INSPECT)
    yield Bad("stored", _stored(lambda tensors: None), command=FOLD)
    for name, command in {
        "fold": FOLD,
        "fold-scaled": f"{FOLD} --scale alpha=0.5 beta=0",
        "inspect": INSPECT,
        "compare": f"compare {FILE} {FILE}",
        "merge": MERGE,
    }.items():
        yield Bad(name, lambda root: None, command=command)


def _edits() -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], object]]]:
    for value in (np.nan, np.inf, -np.inf):
        yield f"values-{value}", lambda v, x=value: v[GROUP].__setitem__(0, x)
    yield "values-over-float32", lambda v: v.update({GROUP: np.full(2, 1e300)})
    yield "values-lost", lambda v: v.pop(GROUP)
    yield "values-invented", lambda v: v.update(unheard=np.zeros(2, np.float32))
    yield "values-none", lambda v: v.clear()
    yield "values-of-three", lambda v: v.update({GROUP: np.zeros(3, np.float32)})
    yield "values-by-row", lambda v: v.update({GROUP: np.zeros((2, 32), np.float32)})
    yield "values-scalar", lambda v: v.update({GROUP: np.zeros((), np.float32)})
    yield "values-bools", lambda v: v.update({GROUP: np.zeros(2, bool)})


def _edits_of_stored() -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], object]]]:
    """Yields changes of the tensors of an initial merge that no run can have written."""
    name = STORED + GROUP
    for value in (np.nan, np.inf):
        yield f"{value}", lambda v, x=value: v[name].__setitem__((0, 0), x)
    yield "lost", lambda v: v.pop(name)
    yield "invented", lambda v: v.update({f"{STORED}unheard": np.zeros(2, np.float32)})
    yield "of-another-shape", lambda v: v.update({name: np.zeros((32, 16), np.float32)})
    yield "a-scalar", lambda v: v.update({name: np.zeros((), np.float32)})
    yield "of-another-dtype", lambda v: v.update({name: np.zeros((32, 32), np.float64)})
    yield "of-whole-numbers", lambda v: v.update({name: np.zeros((32, 32), np.int32)})


def _stored(edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Makes the merge a stored one, all of whose tensors are 0, and damages it."""

    def damage(root: Path) -> None:
        _metadata("initial_merge", merge_by("regmean", stored=True))(root)
        with safe_open(root / FILE, "np") as file:
            metadata = file.metadata()
        shapes = json.loads(metadata["shapes"])
        tensors = {f"{STORED}{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        edit(tensors)
        values = load_file(root / FILE) | tensors
        (root / FILE).unlink()
        save_file(values, root / FILE, metadata)

    return damage


def _metadata(field: str, value: Any) -> Callable[[Path], None]:
    if value is ...:
        return _metadata_text(field, None)
    return _metadata_text(field, value if field == "format" else json.dumps(value))


def _metadata_text(field: str, text: str | None) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        with safe_open(root / FILE, "np") as file:
            metadata = dict(file.metadata())
        metadata.pop(field, None)
        values = load_file(root / FILE)
        (root / FILE).unlink()
        save_file(values, root / FILE, metadata | ({} if text is None else {field: text}))

    return damage


def _values(edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        with safe_open(root / FILE, "np") as file:
            metadata = file.metadata()
        values = load_file(root / FILE)
        edit(values)
        (root / FILE).unlink()
        save_file(values, root / FILE, metadata)

    return damage
