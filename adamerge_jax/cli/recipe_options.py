"""The fields of a recipe as options: the file gives their defaults, the command line overrides.

So the recipe is found and read first, then the command line is parsed with it. Lists of sections,
and mappings of any names, are written on the command line as in the file: in YAML.
"""

import argparse
import dataclasses
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import tyro
import yaml
from pydantic.fields import FieldInfo
from rich.console import Console

from adamerge_jax.cli.command import Invocation, RecipeCommand
from adamerge_jax.cli.compilation import keep_compiled_programs
from adamerge_jax.errors import InputError, in_hand
from adamerge_jax.files.strict_yaml import read_yaml
from adamerge_jax.recipes.loading import (
    parse_recipe,
    read_recipe,
)
from adamerge_jax.recipes.presets import drop_options_of_replaced
from adamerge_jax.recipes.schema import (
    SWITCHED_OFF,
    CoefficientsRecipe,
    ExportRecipe,
    HeadsRecipe,
    LearningRecipe,
    OptimizerRecipe,
    Recipe,
    Section,
)

C = TypeVar("C", bound=RecipeCommand)

_HELP = {"-h", "--help", "--help-all"}

_OFF = ("none", "null")
"""The words that switch a section off, as in YAML."""

_SHORT_HELP: Mapping[type[Section], Collection[str]] = {
    Recipe: ("preset", "coefficients", "heads", "learning", "export", "max_length", "seed"),
    CoefficientsRecipe: ("granularity", "constraint", "start"),
    HeadsRecipe: ("kind",),
    LearningRecipe: ("steps", "batch_size", "examples", "optimizer"),
    OptimizerRecipe: ("learning_rate",),
    ExportRecipe: ("dtype", "adapter"),
}
"""The fields that `--help` shows; `--help-all` shows every one."""

_EXAMPLE = {"base": "BASE", "tasks": {"TASK": {"expert": "EXPERT", "calibration": "DATA"}}}
"""The recipe whose fields `--help` shows where none is given."""


@dataclasses.dataclass
class WithRecipe(Generic[C]):
    """A command and its recipe.

    Attributes:
        command: The command with its own options.
        recipe: The recipe as the command line changes it.
    """

    command: Annotated[C, tyro.conf.arg(name="")]
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]

    @property
    def common_options(self) -> C:
        """The options that are not of the recipe."""
        return self.command

    @property
    def run_folder(self) -> Path | None:
        """The run folder that the command writes to, if it does."""
        return self.command.run_folder_of(self.recipe)

    def run(self, console: Console) -> None:
        """Runs the command."""
        keep_compiled_programs()
        self.command.run(Invocation(self.recipe, self.command.folder, console))


def parse_with_recipe(name: str, command: type[C], options: Sequence[str]) -> WithRecipe[C]:
    """Parses a command line, with the recipe that it names as the default of all fields.

    Args:
        name: The command's name.
        command: Its class.
        options: The arguments after the name.

    Raises:
        InputError: The recipe, or a field given on the command line, cannot be used.
    """
    parser = argparse.ArgumentParser(
        f"adamerge {name}", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--preset")  # decides on the defaults of all other options
    parser.add_argument("--recipe")
    early, options = parser.parse_known_args(options)
    if early.recipe is not None:
        print(
            f"adamerge {name}: --recipe is deprecated; give the recipe first: "
            f"adamerge {name} {early.recipe} ...",
            file=sys.stderr,
        )
        options = [early.recipe, *options]
    asks_for_help = bool(_HELP & set(options))
    in_short = "--help-all" not in options
    file = _find_recipe(name, command, [o for o in options if o not in _HELP])
    options = ["--help" if option == "--help-all" else option for option in options]
    if file is not None:
        with in_hand(file):
            recipe = read_recipe(file, early.preset)
    elif asks_for_help:
        recipe = parse_recipe(_EXAMPLE)
    else:
        raise InputError(f"adamerge {name}: give a recipe, a .yaml file, and options after it")
    options, switched_off = _take_switched_off(options, recipe)
    for path in switched_off:
        recipe = _without(recipe, path.split("."))
    options = _in_full(options, recipe)
    parsed = _parse(name, command, options, recipe, in_short=asks_for_help and in_short)
    named = {o.removeprefix("--").partition("=")[0].replace("-", "_") for o in options}
    fields = drop_options_of_replaced(
        parsed.recipe.model_dump(warnings=False), recipe.model_dump(), named
    )
    # Once more as a whole: what a field may be can depend on another.
    allowed = parsed.command.allow_code
    left_open = {field: auto for field, auto in recipe.left_open.items() if field not in named}
    parsed.recipe = parse_recipe(fields, "command line", allow_code=allowed, left_open=left_open)
    return parsed


def _take_switched_off(options: Sequence[str], recipe: Recipe) -> tuple[list[str], dict[str, None]]:
    """Takes `--section none` out of options, for sections that can be switched off.

    Returns:
        The other options, and the dotted paths of the sections in their order.

    Raises:
        InputError: A section is switched off, and a field of it is given.
    """
    sections = {f"--{path.replace('_', '-')}": path for path in _optional_sections(recipe)}
    others: list[str] = []
    switched_off: dict[str, None] = {}
    remaining = list(options)
    while remaining:
        option = remaining.pop(0)
        flag, equals, value = option.partition("=")
        section = sections.get(flag.replace("_", "-"))
        if section is not None and not equals and remaining:
            value = remaining[0]
        if section is None or value not in _OFF:
            others.append(option)
            continue
        if not equals:
            remaining.pop(0)
        switched_off[section] = None
    for section in switched_off:
        prefix = f"--{section.replace('_', '-')}."
        for option in others:
            if option.replace("_", "-").startswith(prefix):
                raise InputError(
                    f"command line: --{section} none and {option.partition('=')[0]} cannot both "
                    "be; leave one of them out"
                )
    return others, switched_off


def _in_full(options: Sequence[str], recipe: Recipe) -> list[str]:
    """Returns options with `--heads.kind refitted` for `--heads refitted`, and others alike."""
    fields = {
        f"--{path.replace('_', '-')}": value.SHORTHAND
        for path, _, value in _walk(recipe)
        if isinstance(value, Section)
    }
    written = []
    for option in options:
        flag, equals, value = option.partition("=")
        field = fields.get(flag.replace("_", "-"))
        written.append(option if field is None else f"{flag}.{field}{equals}{value}")
    return written


def _optional_sections(recipe: Recipe) -> list[str]:
    """Returns the dotted paths of the sections within that can be switched off."""
    return [path for path, field, _ in _walk(recipe) if field and SWITCHED_OFF in field.metadata]


def _walk(
    section: Section | Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, FieldInfo | None, Any]]:
    """Yields the dotted path of all that is within, its field if it is one, and its value."""
    members: Iterable[tuple[str, FieldInfo | None, Any]]
    if isinstance(section, Section):
        fields = type(section).model_fields
        members = ((name, field, getattr(section, name)) for name, field in fields.items())
    else:
        members = ((name, None, value) for name, value in section.items())
    for name, field, value in members:
        yield f"{path}{name}", field, value
        if isinstance(value, Section | Mapping):
            yield from _walk(value, f"{path}{name}.")


def _sections_to_switch_off(recipe: Recipe) -> str:
    """Returns the sentence of the help about `--section none`."""
    paths = {".".join(_with_any_task(path.split("."))) for path in _optional_sections(recipe)}
    options = ", ".join(f"--{path.replace('_', '-')} none" for path in sorted(paths))
    return f"Sections are switched off by {options}."


def _with_any_task(path: Sequence[str]) -> list[str]:
    """Returns the path of a section with `TASK` in place of a task's name."""
    return ["tasks", "TASK", path[-1]] if path[0] == "tasks" else list(path)


def _without(section: Any, path: Sequence[str]) -> Any:
    """Returns a section with the one at a path within it switched off."""
    name, *rest = path
    if isinstance(section, Mapping):
        return {**section, name: _without(section[name], rest)}
    value = _without(getattr(section, name), rest) if rest else None
    return section.model_copy(update={name: value})


def _find_recipe(name: str, command: type[C], options: Sequence[str]) -> Path | None:
    """Returns the recipe that a command line names, before its fields are known; or None."""
    if not options:
        return None
    if not options[0].startswith("-"):
        return Path(options[0])
    # The parser alone knows how many values an option takes.
    quietly = {"return_unknown_args": True, "console_outputs": False}
    try:
        parsed, _ = _parse(name, command, options, parse_recipe(_EXAMPLE), **quietly)
    except SystemExit:
        return None
    return parsed.command.recipe_file


def _parse(
    name: str,
    command: type[C],
    options: Sequence[str],
    recipe: Recipe,
    *,
    in_short: bool = False,
    **parsing: bool,
) -> Any:
    """Parses options, with a recipe for the defaults of its fields.

    Args:
        name: The command's name.
        command: Its class.
        options: The arguments after the name.
        recipe: The recipe.
        in_short: True to leave most fields of the recipe out of the help.
        **parsing: Options of the parser.
    """
    more = _sections_to_switch_off(recipe)
    if in_short:
        more = f"All options, one for every field: adamerge {name} --help-all. {more}"
    required = [
        field.name
        for field in dataclasses.fields(command)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    return tyro.cli(
        WithRecipe[command],
        default=WithRecipe(command(**dict.fromkeys(required, tyro.MISSING)), recipe),
        args=options,
        prog=f"adamerge {name}",
        description=f"{command.__doc__}\n\n{more}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=_IN_SHORT if in_short else _CONSTRUCTORS,
        **parsing,
    )


_CONSTRUCTORS = tyro.constructors.ConstructorRegistry()
_IN_SHORT = tyro.constructors.ConstructorRegistry()
"""Ways of making sections of options; the second one leaves most fields out of the help."""


@_CONSTRUCTORS.struct_rule
def _unchecked(
    section: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """Makes sections of what was given; the recipe is checked as a whole, in one line."""
    return _section_of_options(section, {})


@_IN_SHORT.struct_rule
def _unchecked_in_short(
    section: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """Makes sections as `_unchecked` does, and hides the fields that are not of the short help."""
    return _section_of_options(section, _SHORT_HELP)


def _section_of_options(
    section: tyro.constructors.StructTypeInfo, shown: Mapping[type[Section], Collection[str]]
) -> tyro.constructors.StructConstructorSpec | None:
    if not (isinstance(section.type, type) and issubclass(section.type, Section)):
        return None
    fields = []
    for name, field in section.type.model_fields.items():
        default = getattr(section.default, name, tyro.MISSING)
        if default is tyro.MISSING and not field.is_required():
            default = field.get_default(call_default_factory=True)
        is_shown = not shown or name in shown.get(section.type, ())
        annotation: Any = field.annotation
        if not is_shown:
            annotation = Annotated[annotation, tyro.conf.Suppress]
        # Lines of the source are no lines of the help.
        words = " ".join((field.description or "").split())
        fields.append(tyro.constructors.StructFieldSpec(name, annotation, default, words))

    def make(**given: Any) -> Section:
        return section.type.model_construct(**given)

    make.__doc__ = section.type.__doc__  # which the help shows
    return tyro.constructors.StructConstructorSpec(make, tuple(fields))


@_IN_SHORT.primitive_rule
@_CONSTRUCTORS.primitive_rule
def _as_yaml(
    field: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Reads fields in YAML that have no fixed names within: options, and lists of sections."""
    members = [member for member in get_args(field.type) if isinstance(member, type)]
    of_sections = field.type_origin is list and any(issubclass(m, Section) for m in members)
    if field.type != dict[str, Any] and not of_sections:
        return None

    def write(value: Any) -> list[str]:
        if of_sections:
            value = [section.model_dump(exclude_defaults=True) for section in value]
        return [yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="YAML",
        instance_from_str=lambda given: read_yaml(given[0]),
        is_instance=lambda value: isinstance(value, field.type_origin),
        str_from_instance=write,
    )
