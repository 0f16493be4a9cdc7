"""The contenders of a comparison: which methods, with which options and seeds."""

import copy
import difflib
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from adamerge_jax.errors import InputError, shorten
from adamerge_jax.files.strict_yaml import read_yaml
from adamerge_jax.methods import METHODS, make_method
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.presets import PRESETS, drop_options_of_replaced
from adamerge_jax.recipes.schema import HeadKind, LearningRecipe, Recipe
from adamerge_jax.registry import allow_code, find_registered, is_own_code

RECIPE = "recipe"
"""The entry that stands for learning as the recipe says."""

GROUPS = ("methods", "presets")
"""The entries that stand for all merge methods, and for all presets."""

DEFAULT_ENTRIES = ("methods", RECIPE)

HOW_TO_LEARN = (
    "preset",
    "keep_from_base",
    "interference",
    "coefficients",
    "heads",
    "objectives",
    "regularizers",
    "learning",
)
"""Fields that a preset fills in; a recipe's own are left out where a preset is compared."""


class Contender(NamedTuple):
    """One way to merge, with one seed.

    Attributes:
        name: Its name in tables.
        kind: `references` for the base and the experts themselves, `merge` for a merge method,
            `learning` for learned coefficients.
        fields: The recipe with all defaults, as YAML has it.
        seed: The seed of all randomness but that of the test data.
        method: The name of the merge method.
        options: Its options; a list of numbers is a choice that validation data makes.
        heads: The heads of a merge without learning; those of learning are in its recipe.
    """

    name: str
    kind: Literal["references", "merge", "learning"]
    fields: dict[str, Any]
    seed: int
    method: str = ""
    options: Mapping[str, Any] = {}
    heads: HeadKind = "kept"


FITS: tuple[HeadKind, ...] = ("scaled", "refitted")
"""The heads that can be fitted to any merge; `HeadsRecipe` tells what they are."""

BASE = "base"
"""The method of a contender that is the base itself, with heads fitted to it."""


def reference_contender(recipe: Recipe) -> Contender:
    """Returns the contender that stands for the base and the experts.

    Raises:
        InputError: Test data is missing.
    """
    _require_data(recipe)
    fields = _without_learning(recipe) | {"heads": {"kind": "kept"}}
    return Contender("base and experts", "references", fields, recipe.seed)


def make_contenders(
    recipe: Recipe,
    entries: Iterable[str],
    seeds: Sequence[int],
    heads: Sequence[HeadKind] = (),
    *,
    fits: Sequence[str] = FITS,
    may_run_code: bool = False,
) -> list[Contender]:
    """Returns what is to be measured beside the base and the experts.

    Args:
        recipe: The recipe with models and data.
        entries: Names of merge methods and presets, `recipe`, `methods` or `presets`; or a YAML
            mapping of one of them to its options, of a preset to fields of the recipe.
        seeds: The seeds; a method without randomness is measured with the first one.
        heads: The heads that every contender is measured with. By default learning has those of
            its recipe, and merges without learning have the experts' own and, if the recipe fits
            heads, fitted ones too.
        fits: The heads that can be fitted to these models.
        may_run_code: True if functions of the user's own may be imported.

    Raises:
        InputError: An entry is none of these or refuses an option, or data is missing, or these
            models' heads cannot be so.
    """
    _require_data(recipe)
    for kind in heads:
        if kind != "kept" and ("refitted" if kind == "learned" else kind) not in fits:
            raise InputError(
                f"--with-heads: {kind} is not for these models, whose heads can be "
                f"{' or '.join(('kept', *fits))}"
            )
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds: found {list(seeds)}, expected one seed or several unlike ones")
    merge_heads = [kind for kind in heads if kind != "learned"] or _merge_heads(recipe, fits)
    contenders = []
    for kind in merge_heads:
        if kind != "kept":
            contenders += [_merge_contender(recipe, BASE, BASE, {}, kind, seed) for seed in seeds]
    names: set[str] = set()
    for name, options in _expanded(entries, recipe):
        if may_run_code:
            allow_code([name])
        if is_own_code(name) or name in METHODS:
            added = _merge_contenders(recipe, name, options, merge_heads, seeds)
        elif name in (RECIPE, *PRESETS):
            added = _learning_contenders(recipe, name, options, heads, seeds, may_run_code)
        else:
            choices = (*METHODS, *PRESETS, RECIPE, *GROUPS)
            nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)
            raise InputError(
                f"--methods: found {shorten(repr(name))}; expected merge methods, presets, "
                f"{RECIPE}, {' or '.join(GROUPS)} (nearest is {nearest[0]!r})"
            )
        if added[0].name not in names:
            names.add(added[0].name)
            contenders += added
    return contenders


def choices_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the options that lists of numbers stand for: one of each list, in all combinations.

    Args:
        options: Options of a merge method.
    """
    lists = [value if _is_choice(value) else [value] for value in options.values()]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*lists)]


def _is_choice(value: Any) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    )


def _expanded(entries: Iterable[str], recipe: Recipe) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields names and options of entries, those of groups one by one."""
    for entry in entries:
        name, options = _parse_entry(entry)
        if name not in GROUPS:
            yield name, options
            continue
        if options:
            raise InputError(f"--methods: {name} stands for many and takes no options")
        if name == "presets":
            yield from ((preset, {}) for preset in PRESETS)
            continue
        for method in METHODS:
            grid = method == "task_arithmetic" and _has_validation(recipe)
            yield method, {"coefficient": recipe.evaluation.task_arithmetic} if grid else {}
        yield from ((chosen.name, chosen.options) for chosen in recipe.evaluation.methods)


def _parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of an entry."""
    if not entry.lstrip().startswith("{"):
        return entry, {}
    parsed = read_yaml(entry)
    if isinstance(parsed, dict) and len(parsed) == 1:
        name, options = next(iter(parsed.items()))
        if isinstance(name, str) and isinstance(options, dict):
            return name, options
    raise InputError(
        f"--methods: found {shorten(entry)}; expected a name, or a name with its options such as "
        "'{ties: {density: 0.3}}'"
    )


def _merge_heads(recipe: Recipe, fits: Sequence[str]) -> list[HeadKind]:
    """Returns the heads of merges without learning: what is given to learning is given to them."""
    if recipe.heads.kind == "kept" or not fits:
        return ["kept"]
    return [
        "kept",
        "scaled" if recipe.heads.kind == "scaled" or fits == ("scaled",) else "refitted",
    ]


def _merge_contenders(
    recipe: Recipe,
    method: str,
    options: dict[str, Any],
    heads: Sequence[HeadKind],
    seeds: Sequence[int],
) -> list[Contender]:
    choices = choices_of(options)
    for choice in choices:
        made = make_method(method, choice)  # refused here rather than after hours
    if len(choices) > 1 and not _has_validation(recipe):
        raise InputError(
            f"tasks: {method} is to choose among {len(choices)} settings, which takes labelled "
            "validation data of every task; give it, or one value of each option"
        )
    function = find_registered("--methods", METHODS, method)
    takes_seed = "seed" in inspect.signature(function).parameters and "seed" not in options
    # What a method is told of the calibration data is chance only where examples are drawn.
    varies = takes_seed or (made.needs_data and _draws_calibration(recipe))
    words = ", ".join(
        f"{option} {_range_in_words(value) if _is_choice(value) else value}"
        for option, value in options.items()
    )
    name = method + (f" ({words})" if words else "")
    contenders = []
    for kind in heads:
        # The parts of cross-validation are drawn.
        for seed in seeds if varies or kind != "kept" else seeds[:1]:
            seeded = options | ({"seed": seed} if takes_seed else {})
            contenders.append(_merge_contender(recipe, name, method, seeded, kind, seed))
    return contenders


def _merge_contender(
    recipe: Recipe,
    name: str,
    method: str,
    options: Mapping[str, Any],
    heads: HeadKind,
    seed: int,
) -> Contender:
    fields = _without_learning(recipe) | {"seed": seed, "heads": {"kind": heads}}
    return Contender(_with_heads(name, heads), "merge", fields, seed, method, options, heads)


def _without_learning(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe with general text that is measured alone, of which there is less then."""
    fields = recipe.model_dump(mode="json")
    if fields["retain"] is not None:
        fields["retain"] |= {"weight": 0.0}
    return fields


def _with_heads(name: str, heads: HeadKind) -> str:
    return name if heads == "kept" else f"{name}, heads {heads}"


def _range_in_words(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:g}"
    return f"{min(values):g} to {max(values):g}, chosen with labels"


def _learning_contenders(
    recipe: Recipe,
    name: str,
    overrides: dict[str, Any],
    heads: Sequence[HeadKind],
    seeds: Sequence[int],
    may_run_code: bool,
) -> list[Contender]:
    before = recipe.model_dump(mode="json")
    if name != RECIPE:
        before = _with_preset(recipe, name, may_run_code).model_dump(mode="json")
    changed = _dotted(overrides)
    fields = drop_options_of_replaced(_merged(before, overrides), before, changed.keys())
    label = name
    if changed:
        label += f" ({', '.join(f'{path} {value}' for path, value in changed.items())})"
    contenders = []
    for kind in heads or (None,):
        chosen = fields if kind is None else _merged(fields, {"heads": {"kind": kind}})
        for seed in seeds:
            seeded = parse_recipe(
                chosen | {"seed": seed}, f"--methods {name}", allow_code=may_run_code
            ).model_dump(mode="json")
            named = _with_heads(label, kind or "kept")
            contenders.append(Contender(named, "learning", seeded, seed))
    return contenders


def _with_preset(recipe: Recipe, preset: str, may_run_code: bool) -> Recipe:
    """Returns the recipe as the preset learns; labelled data are those of validation."""
    dumped = recipe.model_dump(mode="json")
    fields = {name: value for name, value in dumped.items() if name not in HOW_TO_LEARN}
    fields["preset"] = preset
    if recipe.heads != recipe.heads_of_preset:
        fields["heads"] = dumped["heads"]
    if recipe.own_keep_from_base:
        fields["keep_from_base"] = recipe.keep_from_base
    learning = PRESETS[preset].get("learning", {})
    examples = recipe.learning.examples
    of_its_preset = PRESETS[recipe.preset].get("learning", {}).get("examples")
    if examples is not None and examples != of_its_preset:
        # One example of each task at least is held out.
        held_out = max(1, round(examples * learning.get("held_out", LearningRecipe().held_out)))
        batch_size = min(examples - held_out, learning.get("batch_size", examples))
        fields["learning"] = {"examples": examples, "batch_size": max(1, batch_size)}
    if any(term["name"] == "cross_entropy" for term in PRESETS[preset]["objectives"]):
        if not _has_validation(recipe):
            raise InputError(
                f"tasks: {preset} learns from labels, which are taken from the validation data; "
                "give it for every task, or name other --methods"
            )
        fields["tasks"] = {
            task: task_fields | {"calibration": task_fields["validation"]}
            for task, task_fields in fields["tasks"].items()
        }
    return parse_recipe(fields, f"--methods {preset}", allow_code=may_run_code)


def _require_data(recipe: Recipe) -> None:
    for task, task_recipe in recipe.tasks.items():
        if task_recipe.test is None:
            raise InputError(f"tasks.{task}.test: is missing; the table is made from it")
    if recipe.devices.distributed:
        raise InputError(
            "devices.distributed: methods are compared in one process after the other; leave it out"
        )


def _has_validation(recipe: Recipe) -> bool:
    return all(task.validation is not None for task in recipe.tasks.values())


def _draws_calibration(recipe: Recipe) -> bool:
    """Returns True if the seed decides which calibration examples there are."""
    is_limited = any(source.limit is not None for source in recipe.calibration_sources)
    return is_limited or recipe.learning.examples is not None


def _merged(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested fields with some of them replaced."""
    merged = copy.deepcopy(dict(fields))
    for name, value in overrides.items():
        inner = merged.get(name)
        is_section = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[name] = _merged(inner, value) if is_section else value
    return merged


def _dotted(fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns nested fields by their dotted paths."""
    dotted: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            dotted |= _dotted(value, f"{path}{name}.")
        else:
            dotted[f"{path}{name}"] = value
    return dotted
