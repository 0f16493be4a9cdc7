"""The coefficients file: all that is needed to make a merge again from the same models."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import TypeAdapter
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import (
    Granularity,
    Shapes,
    Values,
    constant,
    make_granularity,
    per_tensor,
)
from adamerge_jax.coefficients.initial_merge import InitialMerge
from adamerge_jax.errors import InputError, in_one_line, shorten
from adamerge_jax.files.writing import write_whole
from adamerge_jax.interference import FittedStep, make_step
from adamerge_jax.parameter_names import is_batch_statistic, is_stacked, unstack
from adamerge_jax.registry import is_own_code

FILE_NAME = "coefficients.safetensors"
"""The name of the file in a run folder."""

BY_SCORE = "search for the best "
"""The beginning of `Coefficients.objective` where coefficients were searched for by their score."""


def file_in(path: Path) -> Path:
    """Returns the coefficients file that a path names: itself, or that of a run folder.

    Raises:
        InputError: It is a folder without one.
    """
    if not path.is_dir():
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    # A front has a file for each point.
    others = [*sorted(path.glob("front/*.safetensors")), *sorted(path.glob(f"*/{FILE_NAME}"))]
    advice = f", such as {others[0]}" if others else ""
    raise InputError(
        f"{path} is a folder without {FILE_NAME}; give a coefficients file{advice}, or a run folder"
    )


IN_MEMORY = "in-memory"
"""The `Source.source` of a model that no file holds."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
        name: `base`, or the task of an expert.
        source: The folder or Hub id as the recipe gives it.
        revision: The Hub revision asked for, if any.
        identity: A fingerprint of the checkpoint; see `Checkpoint.identity`.
    """

    name: str
    source: str
    revision: str | None
    identity: str

    @property
    def in_words(self) -> str:
        """The origin and the beginning of the identity: enough to tell two models apart."""
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.source}{revision} ({self.identity[:19]})"


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Learned coefficients with all that a later merge needs.

    Attributes:
        values: `[K, ...]` by group, float32; groups are named without `*`, one per layer.
        granularity: Name of the granularity.
        granularity_options: Its options.
        interference: Steps that changed the task vectors before mixing, in this order.
        constraint: Name of the constraint under which they were learned.
        shapes: Shapes of the mixed parameters, by names without `*`; all others stay the base's.
        base: The base model.
        experts: The K experts in the order of the last axis of the scale.
        objective: The objective that was minimised, in words; or `BY_SCORE` and the score.
        seed: The recipe's seed.
        step: The step at which they were the best on the held-out calibration data; or the number
            of the best evaluation.
        started_from: The file that their learning started from, if any.
        scaled: Factors that they were multiplied with since, by expert; 0 leaves one out.
        depths: Number of layers of each stack of the base, mixed or not; see `stack_depths`.
        initial: The value at which those started that did not start from a file; None in a file
            from before it was kept.
        initial_merge: The merge to which the task vectors are added in place of the base, if any.
        initial_tensors: The tensors of an initial merge that cannot be computed again, `[*shape]`,
            float32, by the names of `shapes`: all of a method's that reads data, or the statistics
            of batch normalisation that were estimated on data; empty for all others.
        heads: How the tasks' heads were made: kept, scaled, refitted or learned.
        head_tensors: The parameters of heads that are not the experts', by expert and name,
            float32; empty where heads are kept.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from adamerge_jax import Coefficients
        >>> from adamerge_jax.coefficients.file import Source
        >>> base, expert = (Source(name, f"models/{name}", None, "") for name in ("base", "law"))
        >>> learned = Coefficients(
        ...     values={"dense.weight": np.array([0.4], np.float32)},  # [K] by group
        ...     granularity="tensor",
        ...     granularity_options={},
        ...     interference=(),
        ...     constraint="clip",
        ...     shapes={"dense.weight": (2, 3)},
        ...     base=base,
        ...     experts=(expert,),
        ...     objective="entropy",
        ...     seed=0,
        ...     step=100,
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learned.save(Path(folder) / "coefficients.safetensors")
        ...     again = Coefficients.load(Path(folder) / "coefficients.safetensors")
        >>> again.granularity, again.experts[0].name, again.values["dense.weight"].shape
        ('tensor', 'law', (1,))
    """

    values: Mapping[str, np.ndarray]
    granularity: str
    granularity_options: Mapping[str, Any]
    interference: tuple[FittedStep, ...]
    constraint: str
    shapes: Shapes
    base: Source
    experts: tuple[Source, ...]
    objective: str
    seed: int
    step: int
    started_from: str | None = None
    scaled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    depths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    initial: float | None = None
    initial_merge: InitialMerge | None = None
    initial_tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    heads: str = "kept"
    head_tensors: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the mixed parameters, without `*`."""
        return tuple(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(expert.name for expert in self.experts)

    @property
    def is_searched(self) -> bool:
        """True where they were searched for by their score, and not learned."""
        return self.objective.startswith(BY_SCORE)

    @property
    def left_out(self) -> frozenset[str]:
        """Names of the experts whose coefficients were multiplied with 0."""
        return frozenset(name for name, factor in self.scaled.items() if factor == 0)

    @property
    def needs_all_experts(self) -> bool:
        """True if the merge depends on all experts and their order, whatever their coefficients."""
        return bool(self.interference) or self.initial_merge is not None

    @property
    def of_method_alone(self) -> str | None:
        """The method with its options, if the merge is that of its method and nothing is added."""
        is_added_to = any(array.any() for array in self.values.values())
        if self.initial_merge is None or is_added_to or self.heads != "kept":
            return None
        return self.initial_merge.in_words

    def scales(self) -> dict[str, Float[Array, "K ..."]]:
        """Returns the scale of each mixed parameter, by names without `*`."""
        return self.unstacked_granularity.scales(self.stacked_once())

    def per_tensor(self) -> dict[str, Float[np.ndarray, " K"]]:
        """Returns the mean coefficient of each mixed parameter, by names without `*`."""
        values, granularity = self.stacked_once(), self.unstacked_granularity
        means = per_tensor(granularity, values, self.shapes, len(self.experts))
        return {name: np.asarray(mean[0]) for name, mean in means.items()}

    def times(self, factors: Mapping[str, float]) -> "Coefficients":
        """Returns the coefficients, those of some experts multiplied with a factor.

        Args:
            factors: By expert; the others keep theirs. 0 leaves an expert out of the merge.

        Raises:
            InputError: There is no such expert, a factor or a product with it is not finite, or
                none is left; or experts are in an initial merge, which factors do not change.
        """
        if factors and self.initial_merge is not None:
            raise InputError(
                f"scale: the coefficients are added to a merge of all experts by "
                f"{self.initial_merge.in_words}, which factors do not change; leave scale out, or "
                "take an expert out of the recipe and merge or learn again"
            )
        for name, factor in factors.items():
            if name not in self.names:
                raise InputError(
                    f"scale: there is no expert {name!r}; the experts are {', '.join(self.names)}"
                )
            if not np.isfinite(factor):
                raise InputError(f"scale: the factor of {name!r} is {factor}, expected a number")
        # Coefficients are float32, where a factor that is finite here may not be.
        with np.errstate(over="ignore", invalid="ignore"):
            by_expert = np.array([factors.get(name, 1.0) for name in self.names]).astype(np.float32)
            values = {
                group: array * by_expert.reshape(-1, *(1 for _ in array.shape[1:]))
                for group, array in self.values.items()
            }
        if not by_expert.any():
            raise InputError("scale: every expert is left out; the merge would be the base")
        for position, name in enumerate(self.names):
            largest = max(np.abs(array[position]).max(initial=0) for array in values.values())
            if not largest <= _LARGEST:
                raise InputError(
                    f"scale: coefficients of {name!r} times {factors.get(name, 1.0):g} are not "
                    f"finite in float32, or the squares of these ({largest:.3g}) are not; take a "
                    "smaller factor"
                )
        before = {name: self.scaled.get(name, 1.0) * factor for name, factor in factors.items()}
        return dataclasses.replace(self, values=values, scaled={**self.scaled, **before})

    def of_experts(self, names: Sequence[str]) -> "Coefficients":
        """Returns the coefficients of some experts, in the given order.

        Interference steps and initial merges depend on all experts and on their order: coefficients
        of some of them are for reading and for starting from, not for folding.

        Args:
            names: Experts of these coefficients.
        """
        chosen = [self.names.index(name) for name in names]
        return dataclasses.replace(
            self,
            values={group: array[chosen] for group, array in self.values.items()},
            experts=tuple(self.experts[position] for position in chosen),
            scaled={name: self.scaled[name] for name in names if name in self.scaled},
            head_tensors={name: h for name, h in self.head_tensors.items() if name in names},
        )

    @property
    def unstacked_granularity(self) -> Granularity:
        """The granularity, made for the mixed parameters by their names without `*`."""
        return make_granularity(self.granularity, self.granularity_options, self.shapes)

    def make_granularity(self, shapes: Shapes) -> Granularity:
        """Makes the granularity for other shapes; the old form of `unstacked_granularity`."""
        warnings.warn(
            "Coefficients.make_granularity(shapes) is now unstacked_granularity",
            DeprecationWarning,
            stacklevel=2,
        )
        return make_granularity(self.granularity, self.granularity_options, shapes)

    def stacked_once(self) -> Values:
        """Returns values `[1, K, ...]` as a granularity of parameters without `*` takes them."""
        return {group: jnp.asarray(values)[None] for group, values in self.values.items()}

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file: one `[K, ...]` tensor per group, the rest as metadata."""
        emptied: dict[str, Any] = {field: {} for field in _TENSOR_FIELDS}
        fields = dataclasses.asdict(dataclasses.replace(self, **emptied))
        for field in _TENSOR_FIELDS:
            del fields[field]
        # Without these the file is that of older versions.
        if self.initial_merge is None:
            del fields["initial_merge"]
        if not self.head_tensors:
            del fields["heads"]
        metadata = {name: json.dumps(field) for name, field in fields.items()}
        is_plain = self.initial_merge is None and not self.head_tensors
        written_as = _PLAIN_FORMAT if is_plain else _FORMAT
        metadata |= {"format": written_as, "version": version("adamerge_jax")}
        arrays = {group: np.ascontiguousarray(array) for group, array in self.values.items()}
        for name, tensor in self.initial_tensors.items():
            arrays[_INITIAL + name] = np.ascontiguousarray(tensor, np.float32)
        for expert, head in self.head_tensors.items():
            for name, tensor in head.items():
                key = f"{_HEADS}{self.names.index(expert)}/{name}"
                arrays[key] = np.ascontiguousarray(tensor, np.float32)
        write_whole(path, _as_file(arrays, metadata))

    @classmethod
    def load(cls, path: Path | str) -> "Coefficients":
        """Reads a file written by `save`; imports and calls nothing that the file names.

        Args:
            path: The file, or the run folder that it is in.

        Raises:
            InputError: There is no such file, it is not a coefficients file, or it is damaged: its
                metadata cannot be read or cannot be those of a run, or its values are not finite
                or not those of the granularity for its tensors and experts.
        """
        path = file_in(Path(path))
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; expected a coefficients file of an earlier run"
            )
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                values = {group: file.get_tensor(group) for group in file.keys()}  # noqa: SIM118
        # A dtype that NumPy does not have is a TypeError or an AttributeError.
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({in_one_line(error)})"
            ) from error
        version_of_file = metadata.pop("format", None)
        if version_of_file not in (_FORMAT, _PLAIN_FORMAT):
            if (version_of_file or "").startswith(_FORMAT.rstrip("0123456789")):
                raise InputError(
                    f"{path}: not a coefficients file of this version, which reads {_FORMAT!r}; "
                    f"it says {version_of_file!r}: learn again, or use the version that wrote it"
                )
            raise InputError(
                f"{path}: not a coefficients file; expected the coefficients.safetensors of a run"
            )
        try:
            fields = _parse_fields(metadata)
            tensors = {}
            if fields.get("initial_merge"):
                names = [name for name in values if name.startswith(_INITIAL)]
                tensors = {name.removeprefix(_INITIAL): values.pop(name) for name in names}
            heads = _pop_heads(values, fields) if "heads" in fields else {}
            coefficients = cls(values=values, initial_tensors=tensors, head_tensors=heads, **fields)
            coefficients._require_sound()
        except InputError as error:
            raise InputError(
                f"{path}: {error}; the file is damaged or was changed: take it from the run folder "
                "again, or learn again"
            ) from error
        return coefficients

    def _require_sound(self) -> None:
        """Refuses what no run can have written.

        Raises:
            InputError: Facts contradict each other or are outside of their range, or values are
                not finite, or not those of the granularity.
        """
        experts = len(self.experts)
        if not experts or not self.shapes:
            raise InputError(f"it is of {experts} experts and {len(self.shapes)} merged tensors")
        self._require_sound_facts()
        self._require_sound_initial_tensors()
        self._require_sound_heads()
        for group, array in self.values.items():
            if array.shape[:1] != (experts,):
                raise InputError(
                    f"the coefficients of {group} have shape {array.shape}, expected a row for "
                    f"each of {experts} experts"
                )
            if array.dtype.kind != "f":
                raise InputError(f"coefficients of {group} are {array.dtype}, expected float32")
            if not _are_finite(array):
                raise InputError(f"coefficients of {group} are not finite")
        if is_own_code(self.granularity):
            return  # reading the file must not run anything
        granularity = self.unstacked_granularity
        made = jax.eval_shape(lambda: granularity.init(constant(self.shapes, experts, 0.0)))
        if unlike := made.keys() ^ self.values.keys():
            group = min(unlike)
            raise InputError(
                f"it {'lacks' if group in made else 'has'} coefficients of {group}, "
                f"{'which' if group in made else 'not what'} the granularity {self.granularity!r} "
                "has for its tensors"
            )
        for group, array in self.values.items():
            expected = made[group].shape[1:]
            # A tensor in one piece has an axis for it where other layers of its stack are cut.
            if array.shape != expected and (array.shape, expected) != ((experts, 1), (experts,)):
                raise InputError(
                    f"the coefficients of {group} have shape {array.shape}, expected {expected} "
                    f"for the granularity {self.granularity!r}"
                )

    def _require_sound_facts(self) -> None:
        """Refuses experts, tensors, steps and numbers that no run can have had."""
        if "" in self.names or len(set(self.names)) < len(self.names):
            raise InputError(
                f"its experts are {shorten(', '.join(map(repr, self.names)))}, expected a name of "
                "its own for each"
            )
        for name, shape in self.shapes.items():
            # A stacked name would stand for as many names as its shape says.
            if is_stacked(name) or not name:
                raise InputError(f"{shorten(repr(name))} is no name of a merged tensor")
            if (
                len(shape) > _MOST_AXES
                or min(shape, default=1) < 1
                or math.prod(shape) > _MOST_ENTRIES
            ):
                raise InputError(f"{name} has the shape {shorten(repr(shape))}")
        if self.constraint not in CONSTRAINTS:
            raise InputError(f"there is no constraint {shorten(repr(self.constraint))}")
        for field, number in (("seed", self.seed), ("step", self.step)):
            if number < 0:
                raise InputError(f"it has {number} for {field}, expected at least 0")
        for stack, depth in self.depths.items():
            if not 1 <= depth <= _MOST_LAYERS:
                raise InputError(f"{shorten(repr(stack))} has {depth} layers")
        if strangers := self.scaled.keys() - set(self.names):
            raise InputError(f"it scales {shorten(repr(min(strangers)))}, which is no expert of it")
        initial = self.initial_merge
        for step in (*self.interference, *(initial.interference if initial else ())):
            if is_own_code(step.name):
                continue  # reading the file must not run anything
            if not make_step(step.name, step.options).takes(step.fitted, len(self.experts)):
                raise InputError(
                    f"the interference step {step.name} has no facts of {len(self.experts)} task "
                    "vectors"
                )

    def _require_sound_initial_tensors(self) -> None:
        """Refuses tensors of an initial merge that are not those of the merged tensors.

        A merge that the models alone determine may have estimated statistics.
        """
        if self.initial_merge is None:
            return
        tensors, method = self.initial_tensors, shorten(self.initial_merge.name)
        unlike = tensors.keys() ^ self.shapes.keys()
        if not self.initial_merge.stored:
            estimated = set(filter(is_batch_statistic, self.shapes))
            unlike = tensors.keys() - estimated
        if unlike:
            name = min(unlike)
            raise InputError(
                f"it {'has' if name in tensors else 'lacks'} the tensor {shorten(name)} of its "
                f"merge by {method}, expected those that it merges"
            )
        for name, tensor in tensors.items():
            if tensor.shape != self.shapes[name] or tensor.dtype != np.float32:
                raise InputError(
                    f"{name} of its merge by {method} is {tensor.dtype} of shape {tensor.shape}, "
                    f"expected float32 of shape {self.shapes[name]}"
                )
            if not _are_finite(tensor):
                raise InputError(f"{name} of its merge by {method} is not finite")

    def _require_sound_heads(self) -> None:
        """Refuses heads that no run can have fitted or learned."""
        if self.heads not in ("kept", "scaled", "refitted", "learned"):
            raise InputError(f"its heads are {shorten(repr(self.heads))}")
        for expert, head in self.head_tensors.items():
            for name, tensor in head.items():
                where = f"{shorten(name)} of the head of {shorten(repr(expert))}"
                if tensor.dtype != np.float32 or not 1 <= tensor.ndim <= 2:
                    raise InputError(
                        f"{where} is {tensor.dtype} of shape {tensor.shape}, expected a float32 "
                        "vector or matrix"
                    )
                if not _are_finite(tensor):
                    raise InputError(f"{where} is not finite")


def _pop_heads(
    arrays: dict[str, np.ndarray], fields: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Takes the parameters of heads out of the arrays of a file, by expert and name."""
    heads: dict[str, dict[str, np.ndarray]] = {}
    names = [expert.name for expert in fields["experts"]]
    for key in [key for key in arrays if key.startswith(_HEADS)]:
        position, _, name = key.removeprefix(_HEADS).partition("/")
        if position not in map(str, range(len(names))) or not name:
            raise InputError(f"it has {shorten(repr(key))}, which is of no expert's head")
        heads.setdefault(names[int(position)], {})[name] = arrays.pop(key)
    return heads


def _are_finite(values: np.ndarray) -> bool:
    """Returns True for coefficients that are finite as float32, which they become when used."""
    return bool((np.abs(values) <= np.finfo(np.float32).max).all())


def _as_file(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the content of a safetensors file, the same in every process.

    The library writes metadata in an order that changes from process to process.
    """
    content = save(dict(arrays))
    length = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(metadata)} | json.loads(content[8 : 8 + length])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment, in bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


_LARGEST = float(np.sqrt(np.finfo(np.float32).max))
"""The largest coefficient: its square is finite in float32, as are its products with weights."""

_FORMAT = "adamerge_jax coefficients 4"

_PLAIN_FORMAT = "adamerge_jax coefficients 3"
"""The format of files without an initial merge and heads, which older versions read too; they would
fold the others to another merge."""

_INITIAL = "initial_merge/"
"""The beginning of the names of an initial merge's tensors in a file."""

_HEADS = "heads/"
"""The beginning of the names of heads' parameters in a file; the expert's position follows."""

_TENSOR_FIELDS = ("values", "initial_tensors", "head_tensors")
"""The fields that are tensors of the file; the others are its metadata."""

_MOST_AXES = 16
"""The largest number of axes of a tensor."""

_MOST_ENTRIES = 2**48
"""The largest number of entries of a tensor."""

_MOST_LAYERS = 100_000
"""The largest number of layers of a stack."""


def unstack_values(values: Values) -> dict[str, np.ndarray]:
    """Returns values `[K, ...]` by the group of each layer, on the host.

    Args:
        values: `[G, K, ...]` by stacked group.
    """
    unstacked: dict[str, np.ndarray] = {}
    for group, array in values.items():
        rows = np.asarray(array, np.float32)
        names = unstack(group, len(rows)) if is_stacked(group) else [group]
        unstacked |= dict(zip(names, rows, strict=True))
    return unstacked


def _parse_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields that a file has as metadata; those that other tools added are ignored.

    Raises:
        InputError: One is missing, no JSON, of another type, or has a number that is not finite.
    """
    parsed = {}
    for field in dataclasses.fields(Coefficients):
        name = field.name
        if name in _TENSOR_FIELDS:
            continue
        if name not in metadata:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise InputError(f"its metadata lack {name}")
            continue
        try:
            # Unlike Python's own, this parser stops at lists within lists without end.
            _require_plain(from_json(metadata[name], allow_inf_nan=False))
            parsed[name] = TypeAdapter(field.type).validate_json(metadata[name], strict=True)
        except ValueError as error:  # the parser's, or that of pydantic
            raise InputError(
                f"its metadata have {metadata[name]!r:.60} for {name}, which cannot be read"
            ) from error
    return parsed


def _require_plain(value: Any) -> None:
    """Refuses numbers that can do harm where they are used; texts are escaped where they are shown.

    Raises:
        ValueError: A number is not finite or has more than 64 bits.
    """
    if isinstance(value, dict):
        _require_plain(list(value.values()))
    elif isinstance(value, list):
        for member in value:
            _require_plain(member)
    elif isinstance(value, int | float) and not abs(value) < 2**64:
        raise ValueError("a number is too large")
