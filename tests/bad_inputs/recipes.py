"""Recipes that are no YAML, hold unknown or impossible fields, or name what they must not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from numpy.random import Generator

from adamerge_jax.recipes.schema import Recipe
from tests.bad_inputs.bad import DEEP, LEARN, Bad, recipe_field, shown, written
from tests.bad_inputs.suites import read_recipe, replace

FILE = "recipe.yaml"

NAN, INFINITY = float("nan"), float("inf")

WRONG: tuple[Any, ...] = ("word", -1, 1e39, 0.5, NAN, [], ["a", 1], {"a": {"b": 1}}, True, None)
"""Values that most fields refuse; the schema's own validator says which."""

IMPOSSIBLE: dict[str, list[Any]] = {
    "coefficients.initial": [NAN, INFINITY, -INFINITY, 1e39, -0.5, 1.5],
    "coefficients.granularity": [
        "tensr",
        "",
        "os:system",
        "builtins:print",
        "subprocess:Popen",
        "a b",
        ":",
        "x" * 5000,
        "../x",
        "nowhere:function",
        "tests.own_granularity:unheard",
        "os:path:join",
        "builtins:",
    ],
    "coefficients.granularity_options": [{"pieces": 4}, {"a": NAN}],
    "coefficients.start": [
        "none.safetensors",
        "none.yaml",
        "base",
        "recipe.yaml",
        "x" * 300,
        "a\0b",
        "",
    ],
    "coefficients.other_base": [True],
    "evaluation.task_arithmetic": [[NAN], [INFINITY], [], [1e39]],
    "evaluation.methods": [
        [{"name": "tis"}],
        [{"name": "os:system"}],
        [{"name": "ties", "options": {"density": NAN}}],
        [{"name": "ties", "options": {"density": 7}}],
        [{"name": "ties", "options": {"wait": 1}}],
        [{"name": "task_arithmetic", "options": {"coefficient": NAN}}],
        [{"name": "task_arithmetic", "options": {"coefficient": "x"}}],
    ],
    "evaluation.lm_eval": [
        [],
        [1],
        "arc_easy",
        {"tasks": []},
        {"tasks": ["arc_easy"], "limit": 0},
        {"tasks": ["arc_easy"], "num_fewshot": -1},
        {"tasks": ["arc_easy"], "include_path": "base"},
    ],
    "search.lm_eval": [{"tasks": ["arc_easy"], "include_path": "base"}],
    "learning.optimizer.learning_rate": [NAN, INFINITY, 0, -1.0, 1e39],
    "learning.optimizer.name": ["adamm", "lbfgs", "", "os:system", "chain", "__doc__", "x" * 3000],
    "learning.optimizer.options": [
        {"b1": NAN},
        {"b1": "x"},
        {"b9": 0.5},
        {"learning_rate": 1},
        {"b1": {}},
        {"eps": NAN},
        {"b1": INFINITY},
    ],
    "learning.optimizer.schedule": ["unheard", "os:system", ""],
    "learning.optimizer.clip_norm": [NAN, 0, -1, INFINITY],
    "learning.held_out": [NAN, 0, 1, -0.1, 2],
    "learning.control": [NAN, 0.5, 2],
    "learning.steps": [0, -1, 2.5, 10**400, NAN],
    "learning.batch_size": [0, 23, 10**12],
    "learning.microbatches": [3, 0],
    "learning.examples": [1, 0, -5],
    "objectives": [
        [],
        [{"name": "entrpy"}],
        [{"name": "entropy", "weight": NAN}],
        [{"name": "entropy", "weight": 0}],
        [{"name": "entropy", "weight": INFINITY}],
        [{"name": "entropy", "weight": 1e39}],
        [{"name": "entropy", "weight": {"gamma": 1}}],
        [{"name": "entropy", "weight": {"alpha": NAN}}],
        [{"name": "entropy", "options": {"wait": 1}}],
        [{"name": "logit_alignment", "options": {"temperature": 0}}],
        [{"name": "logit_alignment", "options": {"temperature": NAN}}],
        [{"name": "logit_alignment", "options": {"temperature": "x"}}],
        [{"name": "logit_alignment", "options": {"top_tokens": 5}}],
        [{"name": "hidden_state_alignment", "options": {"layers": [99]}}],
        [{"name": "cross_entropy"}],
        [{"name": "os:system"}],
        [{"name": "builtins:print"}],
    ],
    "regularizers": [
        [{"name": "distance", "weight": NAN}],
        [{"name": "distnce"}],
        [{"name": "os:system"}],
        [{"name": "distance", "weight": INFINITY}],
        [{"name": "distance", "options": {"p": NAN}}],
        [{"name": "distance", "options": {"wait": 1}}],
        [{"name": "distance", "weight": 1e39}],
    ],
    "interference": [
        [{"name": "trm"}],
        [{"name": "trim", "options": {"density": NAN}}],
        [{"name": "os:system"}],
        [{"name": "trim", "options": {"density": 7}}],
        [{"name": "trim", "options": {"density": "x"}}],
        [{"name": "drop_and_rescale", "options": {"density": 0}}],
        [{"name": "trim", "options": {"d": 1}}],
    ],
    "keep_from_base": [["unheard.*"], ["["], ["*"], [""]],
    "seed": [-1, 2**70, 0.5, 10**4000, NAN],
    "max_length": [1, 0, -5, 2.5],
    "name": ["../x", "/abs", "a/b", "", ".", "..", "x" * 300, "a\0b", "a\nb", "\x1b[31m"],
    "preset": ["unheard", "", "../x", 5],
    "tokenizer": ["gamma", "", "../x"],
    "base": [
        "none",
        "/none/here",
        "",
        ".",
        "recipe.yaml",
        "x" * 300,
        "x" * 5000,
        "a\0b",
        "a\nb",
        "~none/x",
    ],
    "tasks.alpha.expert": [
        "none/here",
        "",
        "x" * 300,
        "a\0b",
        "recipe.yaml",
        {"path": "alpha", "revision": "x"},
    ],
    "tasks.alpha.calibration": [
        "",
        "x" * 300 + ".jsonl",
        "a\0b.jsonl",
        ".",
        "/dev/null",
        "/proc/self/mem",
    ],
    "tasks.alpha.templates": [[5], "abc"],
    "tasks.alpha.class_names": [[5], "abc"],
    "search.bounds": [[1, 0], [0, 1e9], [NAN, 1], [0], [0, 1, 2]],
    "search.sigma": [0, -1, NAN, 1e39],
    "search.population": [3, 0],
    "search.score": ["beauty"],
    "search.tasks": [[]],
    "front.bounds": [[0.5, 0.5], ["a", "b"]],
    "front.score": ["loss "],
    "devices.model": [0, -1, 3, 10**9],
    "devices.coordinator": ["host:1"],
    "export.shard_megabytes": [0, -1],
    "task_vectors.dtype": ["int3", "float64"],
    "tracking": [["unheard"], "tensorboard"],
}
"""Fields and values that no run can have, whatever their types."""

TASK_NAMES: tuple[Any, ...] = (
    "../x",
    "/abs",
    "a/b",
    "",
    " ",
    ".",
    "..",
    "a b",
    "base",
    "x" * 256,
    "x" * 5000,
    "a\0b",
    "a\nb",
    "-x",
    "a\\b",
    "\x1b[31m",
    True,
    False,
    2023,
    1.5,
    None,
    "a:b",
    "*",
    "~",
)


def make(generator: Generator, suites: dict[str, Path]) -> Iterator[Bad]:
    """Yields bad recipes: their text, the types and the values of their fields, their names."""
    text = (suites["text"] / FILE).read_text()
    fields = read_recipe(suites["text"])
    for name, content in _texts(text, generator):
        yield Bad(name, written(FILE, content))
    yield from _wrong_types(fields)
    for path, values in IMPOSSIBLE.items():
        for number, value in enumerate(values):
            # Without --out the name is the folder's.
            command = "learn recipe.yaml" if path == "name" else LEARN
            name = f"{path}-{number}-{shown(value)}"
            yield Bad(name, recipe_field(path, value), command=command)
    for number, task in enumerate(TASK_NAMES):
        yield Bad(f"task-{number}-{shown(task)}", _task_called(task))
    for name, options in {
        "nan": "--coefficients.initial nan",
        "preset": "--preset unheard",
        "out-in-a-file": "--out recipe.yaml/run",
        "out-long": f"--out {'x' * 300}",
        "out-is-a-file": "--out recipe.json",
        "out-is-full": "--out base",
        "root": "--root none",
        "resume": "--resume --out base",
    }.items():
        command = f"learn recipe.yaml {options}"
        yield Bad(f"option-{name}", lambda root: None, command=command)
    for number, options in enumerate(("coefficient=0.4", "5", "[1]", "null")):
        command = f"merge recipe.yaml --method task_arithmetic --options {options} --out out"
        yield Bad(f"option-method-{number}", lambda root: None, command=command)
    for name, command in {
        "no-command": "lern recipe.yaml",
        "no-recipe": "learn",
        "recipe-absent": "learn none.yaml",
        "recipe-is-a-folder": "learn base",
        "recipe-is-long": f"learn {'x' * 300}",
        "recipe-is-an-image": "learn image.yaml",
        "report-of-nothing": "report none",
        "report-of-a-suite": "report .",
    }.items():
        yield Bad(
            name,
            lambda root: (root / "image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n"),
            command=command,
        )


def _texts(text: str, generator: Generator) -> Iterator[tuple[str, bytes | str]]:
    """Yields texts that are no YAML, no fields, or fields that lose others."""
    laughs = "name: [&a0 [x,x,x,x,x,x,x,x,x,x]" + "".join(
        f",&a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)
    )
    yield "empty", ""
    yield "blank", "\n\n"
    yield "comment", "# nothing"
    yield "number", "5"
    yield "word", "word"
    yield "list", "- a\n- b\n"
    yield "null", "null"
    yield "two-documents", f"{text}---\n{text}"
    yield "tab", text.replace("  ", "\t", 1)
    yield "not-utf-8", text.encode() + b"name: \xff\xfe\n"
    yield "latin-1", text.encode() + "name: caf\u00e9\n".encode("latin-1")
    yield "nul", text.encode() + b"name: a\0b\n"
    yield "zeros", bytes(2000)
    yield "html", "<!DOCTYPE html><html></html>"
    yield "json-cut", '{"base": "base", "tasks": {'
    yield "flow-open", text + "objectives: [{name: entropy\n"
    yield "quote-open", text + 'name: "run\n'
    yield "indent", text + "   name: run\n"
    yield "colon", text + "name: a: b\n"
    yield "anchor-unknown", text + "name: *nowhere\n"
    yield "merge-of-a-word", text + "learning: {<<: word}\n"
    yield "merge-recursive", text.replace("learning:", "learning: &l\n  <<: *l", 1)
    yield "anchor-recursive", text + "evaluation: &e {methods: [*e]}\n"
    yield "laughs-in-name", f"{text}{laughs}]\n"
    yield "laughs-in-a-list", f"{text}{laughs.replace('name', 'keep_from_base')}]\n"
    yield (
        "laughs-in-options",
        text + "coefficients: {granularity_options: {a: " + laughs[6:] + "]}}\n",
    )
    yield "deep-list", f"{text}name: {'[' * DEEP}{']' * DEEP}\n"
    yield "deep-fields", f"{text}name: {'{a: ' * 5000}1{'}' * 5000}\n"
    yield "deep-indent", text + "".join(" " * n + "a:\n" for n in range(3000))
    yield "deep-at-once", "[" * DEEP
    yield "deep-sequence", text + "name:\n" + "- " * 20_000 + "x\n"
    yield "huge-hexadecimal", f"{text}seed: 0x{'f' * 5000}\n"
    yield "huge-decimal", f"{text}seed: {'9' * 5000}\n"
    yield "huge-sexagesimal", f"{text}seed: 1{':59' * 5000}\n"
    yield "huge-binary", f"{text}seed: 0b{'1' * 20000}\n"
    yield "tag-of-python", text + "name: !!python/object/apply:os.system ['true']\n"
    yield "tag-of-python-name", text + "name: !!python/name:os.system\n"
    yield "tag-unknown", text + "name: !unheard x\n"
    yield "tag-wrong", text + "seed: !!int word\n"
    yield "tag-of-binary", text + "name: !!binary '!!!'\n"
    yield "key-list", text + "? [a, b]\n: 1\n"
    yield "key-fields", text + "? {a: b}\n: 1\n"
    yield "key-null", text + "~: 1\n"
    yield "key-true", text + "true: 1\n"
    for section in ("base: base", "learning: {steps: 3}", "tasks: {}", "max_length: 16"):
        yield f"duplicate-{section.partition(':')[0]}", f"{text}{section}\n"
    yield "duplicate-task", text.replace("  beta:", "  alpha:")
    yield "duplicate-step", text.replace("steps: 2", "steps: 2\n  steps: 3")
    drawn = 0
    while drawn < 8:
        place = int(generator.integers(len(text)))
        character = "\t\0{[\"'&*!%@`"[int(generator.integers(12))]
        changed = text[:place] + character + text[place + 1 :]
        try:
            yaml.safe_load(changed)
        except yaml.YAMLError:
            drawn += 1
            yield f"drawn-{drawn}-{ord(character)}-at-{place}", changed


def _wrong_types(fields: dict[str, Any]) -> Iterator[Bad]:
    """Yields a field of every section with a value that the schema's validator refuses."""
    schema = Recipe.model_json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    # A path alone stands for a section, which the schema does not say.
    healthy = fields | {"objectives": [{"name": "entropy"}], "base": {"path": fields["base"]}}
    for task in healthy["tasks"].values():
        task["expert"] = {"path": task["expert"]}
    assert validator.is_valid(healthy)
    for number, (path, value) in enumerate(_choices(schema)):
        changed = yaml.safe_load(yaml.safe_dump(healthy))
        section = changed
        *sections, field = path.split(".")
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
        if not validator.is_valid(changed):
            yield Bad(f"type-{number}-{path}-{shown(value)}", recipe_field(path, value))
    for section in (
        "",
        "learning.",
        "coefficients.",
        "export.",
        "tasks.alpha.",
        "learning.optimizer.",
    ):
        yield Bad(f"unknown-{section or 'top'}", recipe_field(f"{section}lerning", 5))
    for path in ("base", "tasks", "tasks.alpha.expert", "tasks.alpha.calibration"):
        yield Bad(f"missing-{path}", _without(path))
    for name, tasks in {"none": {}, "null": None, "list": ["alpha"], "word": "alpha"}.items():
        yield Bad(f"tasks-{name}", recipe_field("tasks", tasks))


def _choices(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields two wrong values for each field, another two for the next."""
    number = 0
    for path in _paths(schema, schema, ""):
        for _ in range(3):
            yield path, WRONG[number % len(WRONG)]
            number += 1


def _paths(schema: dict[str, Any], section: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yields the paths of all fields of a JSON schema; the task is `alpha`."""
    for name, field in section.get("properties", {}).items():
        if name == "tasks" and not prefix:
            task = schema["$defs"][field["additionalProperties"]["$ref"].rpartition("/")[2]]
            yield from _paths(schema, task, "tasks.alpha.")
            continue
        yield f"{prefix}{name}"
        reference = field.get("$ref") or next(
            (f["$ref"] for f in field.get("allOf", field.get("anyOf", [])) if "$ref" in f), None
        )
        # Sections that may be a path alone stand so in the recipe, and have no fields there.
        if reference and not reference.endswith("Source"):
            part = schema["$defs"][reference.rpartition("/")[2]]
            yield from _paths(schema, part, f"{prefix}{name}.")


def _without(path: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        fields = section = read_recipe(root)
        *sections, field = path.split(".")
        for name in sections:
            section = section[name]
        del section[field]
        replace(root / FILE, yaml.safe_dump(fields))

    return damage


def _task_called(name: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        fields = read_recipe(root)
        fields["tasks"] = {name: fields["tasks"]["alpha"], "beta": fields["tasks"]["beta"]}
        replace(root / FILE, yaml.safe_dump(fields, sort_keys=False))

    return damage
