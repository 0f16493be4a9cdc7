"""Changes that make a run fit: the fastest of many combinations of fields.

The memory of a combination is put together from few traces. What is held depends on the dtype and
the place of task vectors, activations grow with the examples that are run at a time, and nothing
else has to be traced anew. The combination that wins is then traced as a whole.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp

from adamerge_jax.errors import InputError
from adamerge_jax.plan.hardware import Device
from adamerge_jax.plan.memory import Memory, Programs, memory_of, programs_of
from adamerge_jax.plan.mixing_time import Mixing
from adamerge_jax.plan.outline import Outline
from adamerge_jax.plan.work import Work
from adamerge_jax.recipes.schema import TaskVectorsRecipe

Fields = Mapping[str, Any]
"""Values by the field of a recipe."""

MOST_TRIED = 3
"""The combinations that are traced as a whole before the smallest is taken."""

_SMALLER_BATCH = 0.02
"""The part of its time by which a step is slower with each halving of what runs at a time."""

_ROUNDED = 0.02
"""The part of its time that a step may take longer with task vectors of twice as many bits."""

_PREFERRED = ("learning.rematerialize", "learning.mix", "learning.microbatches")
"""Fields in the order in which they are advised, before all others."""


class Change(NamedTuple):
    """An advised change of a recipe, made after those before it.

    Attributes:
        field: The field of the recipe.
        value: The new value of the field.
        peak: The predicted peak in bytes, with all changes up to this one.
        fits: True if this peak is within the device's memory.
    """

    field: str
    value: Any
    peak: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a run is to fit on.

    Attributes:
        device: The device.
        floor: The bytes of the process without any array.
        devices: The number of devices among which examples are split.
        split: The number of devices among which parameters are split.
    """

    device: Device
    floor: int
    devices: int = 1
    split: int = 1

    def peak(self, memory: Memory) -> int:
        """Returns the peak in bytes of the device, or of the process on a CPU."""
        if self.device.is_cpu:
            return memory.host_peak(shared=True)[1]
        return memory.device_peak().device

    def measured(self, merge: Outline) -> int:
        """Returns the peak of a merge whose programs are traced."""
        learning = merge.learning()
        programs = programs_of(
            merge,
            learning,
            compiled=False,
            is_cpu=self.device.is_cpu,
            names=("step", "expert"),  # an evaluation keeps less than a step
        )
        return self.peak(self.memory(merge, programs))

    def held(self, merge: Outline) -> Memory:
        """Returns the memory of a merge but for what its programs take."""
        nothing = Work(0.0, 0.0, 0)
        return self.memory(merge, Programs(nothing, nothing, nothing, 1))

    def memory(self, merge: Outline, programs: Programs) -> Memory:
        """Returns the memory of a merge with its programs."""
        learning = merge.learning()
        return memory_of(
            merge, learning, programs, floor=self.floor, devices=self.devices, split=self.split
        )


def advise(
    merge: Outline,
    target: Target,
    programs: Programs,
    report: Callable[[str], Any] = lambda line: None,
    fields: Collection[str] | None = None,
) -> list[Change]:
    """Returns changes of a recipe that does not fit, one after the other.

    Args:
        merge: The merge.
        target: The device.
        programs: The work of the merge's programs, from their traces.
        report: Shows what is tried.
        fields: The fields that may change; None for all.

    Returns:
        The changes of the fastest combination that fits; or those that lower the peak where none
        does. Empty where none lowers it.
    """
    before: dict[str, Change] = {}
    changes: list[Change] = []
    for resort in (None, *_last_resorts(merge)):
        if resort is not None:
            field, value = resort
            if fields is not None and field not in fields:
                continue
            try:
                merge = merge.changed(field, value)
            except InputError:
                continue  # the other fields of the recipe do not go with it
        given = programs if resort is None else None
        combinations = _Combinations(merge, target, report, given, fields)
        if resort is not None:
            before[field] = Change(field, value, combinations.peak({}), fits=False)
        fastest = combinations.fastest()
        for chosen in fastest:
            report(f"tracing {_in_words(chosen)}")
            peak = target.measured(combinations.with_fields(chosen))
            changes = _one_by_one(combinations, [*before.values()], chosen, peak)
            if changes and changes[-1].fits:
                return changes
        if fastest:
            continue  # the estimates were too low
        smallest = combinations.smallest()
        peak = target.measured(combinations.with_fields(smallest))
        changes = _one_by_one(combinations, [*before.values()], smallest, peak)
    return changes


class _Combinations:
    """The combinations of fields that may make a merge fit, with their peaks and times.

    Attributes:
        merge: The merge.
        target: The device.
        parts: The numbers of microbatches.
        sizes: The numbers of examples that are evaluated at a time.
    """

    def __init__(
        self,
        merge: Outline,
        target: Target,
        report: Callable[[str], Any],
        programs: Programs | None,
        fields: Collection[str] | None,
    ):
        """Traces as much as the peaks and times need.

        Args:
            merge: The merge.
            target: The device.
            report: Shows what is traced.
            programs: The work of the merge's programs, where they are traced already.
            fields: The fields that may change; None for all.
        """
        self._programs = programs
        self._fields = fields
        self._itemsize = max(leaf.dtype.itemsize for leaf in merge.base.values())
        self.merge = merge
        self.target = target
        recipe = merge.recipe
        batch = recipe.learning.batch_size
        self._batch = batch
        self.parts = [n for n in range(recipe.learning.microbatches, batch + 1) if batch % n == 0]
        if not self._allowed("learning.microbatches", batch):
            self.parts = [recipe.learning.microbatches]
        self.parts = self._open("learning.microbatches", self.parts)
        self._start = {
            "learning.rematerialize": recipe.learning.rematerialize,
            "learning.mix": recipe.learning.mix,
            "learning.microbatches": recipe.learning.microbatches,
            "evaluation.batch_size": recipe.evaluation.batch_size,
            "task_vectors.dtype": recipe.task_vectors.dtype,
            "task_vectors.memory": recipe.task_vectors.memory,
        }
        self._steps: dict[str, list[tuple[int, Work]]] = {}
        choices = [*dict.fromkeys((recipe.learning.rematerialize, "layer"))]
        for choice in self._open("learning.rematerialize", choices):
            report(f"tracing steps with rematerialize {choice}")
            self._steps[choice] = [
                (batch // parts, self._step(choice, parts))
                for parts in dict.fromkeys((self.parts[0], self.parts[-1]))
            ]
        size = recipe.evaluation.batch_size
        self.sizes = self._open(
            "evaluation.batch_size", [size >> shift for shift in range(size.bit_length())]
        )
        self._experts = [
            (count, self._expert(count)) for count in dict.fromkeys((size, self.sizes[-1]))
        ]
        self._held: dict[tuple[str | None, str], tuple[Memory, Mixing]] = {}
        for dtype, place in itertools.product(self._dtypes(), self._places()):
            report(f"task vectors in {dtype or 'their dtype'}, memory: {place}")
            try:
                changed = self.with_fields(
                    {"task_vectors.dtype": dtype, "task_vectors.memory": place}
                )
                self._held[dtype, place] = target.held(changed), Mixing.of(changed)
            except InputError:
                continue  # a granularity that does not go with it

    def with_fields(self, fields: Fields) -> Outline:
        """Returns the merge with some fields changed."""
        merge = self.merge
        for field, value in fields.items():
            section, _, name = field.partition(".")
            if getattr(getattr(merge.recipe, section), name) != value:
                merge = merge.changed(field, value)
        return merge

    def fastest(self) -> list[Fields]:
        """Returns the combinations that seem to fit, the fastest first."""
        fitting = [
            fields for fields in self._all() if self.peak(fields) <= self.target.device.memory
        ]
        return [self._needed(fields) for fields in sorted(fitting, key=self._seconds)[:MOST_TRIED]]

    def smallest(self) -> Fields:
        """Returns the combination with the lowest peak; of equal ones the fastest."""
        fields = min(self._all(), key=lambda fields: (self.peak(fields), self._seconds(fields)))
        return self._needed(fields, self.peak(fields))

    def peak(self, fields: Fields) -> int:
        """Estimates the peak of a combination."""
        fields = {**self._start, **fields}
        memory, mixing = self._held[fields["task_vectors.dtype"], fields["task_vectors.memory"]]
        parts = fields["learning.microbatches"]
        examples = self._batch // parts
        step = _between(self._steps[fields["learning.rematerialize"]], examples).kept_bytes
        if parts > 1 and fields["learning.mix"] == "step":
            step += (2 * self._itemsize + 4) * mixing.weights
        expert = _between(self._experts, fields["evaluation.batch_size"]).kept_bytes
        of_programs = {
            "learning": step // self.target.devices,
            "asking the experts": expert // self.target.devices,
            "evaluating": expert // self.target.devices,
            "making the first merge": expert // self.target.devices,
        }
        phases = [
            phase._replace(device=phase.device + of_programs.get(phase.name, 0))
            for phase in memory.phases
        ]
        return self.target.peak(memory._replace(phases=phases))

    def _all(self) -> Iterator[Fields]:
        """Yields all combinations."""
        for dtype, place in self._held:
            for rematerialize, parts, size in itertools.product(
                self._steps, self.parts, self.sizes
            ):
                mixes = [self._start["learning.mix"], "step", "part"]
                for mix in self._open("learning.mix", mixes) if parts > 1 else mixes[:1]:
                    yield {
                        "learning.rematerialize": rematerialize,
                        "learning.mix": mix,
                        "learning.microbatches": parts,
                        "evaluation.batch_size": size,
                        "task_vectors.dtype": dtype,
                        "task_vectors.memory": place,
                    }

    def _seconds(self, fields: Fields) -> float:
        """Estimates the time of a step, for comparisons alone."""
        device, devices = self.target.device, self.target.devices
        _, mixing = self._held[fields["task_vectors.dtype"], fields["task_vectors.memory"]]
        parts = fields["learning.microbatches"]
        mixing = mixing._replace(
            parts=parts,
            once=parts > 1 and fields["learning.mix"] == "step",
            recomputed=fields["learning.rematerialize"] != "nothing",
        )
        work = self._steps[fields["learning.rematerialize"]][0][1]
        attained = device.attainable * devices
        rate = max(device.flops.values()) * attained
        computing = max(work.flops / rate, work.moved_bytes / (device.bandwidth * attained))
        halvings = (
            _halvings(parts) + _halvings(self.sizes[0] // fields["evaluation.batch_size"]) / 4
        )
        seconds = computing * (1 + _SMALLER_BATCH * halvings) + mixing.seconds(device, devices)
        rounded = _halvings(self._bits(None) // self._bits(fields["task_vectors.dtype"]))
        return seconds * (1 + _ROUNDED * max(0, rounded))

    def _needed(self, fields: Fields, limit: int | None = None) -> Fields:
        """Returns the changed fields without those that the peak does not need."""
        limit = self.target.device.memory if limit is None else limit
        needed = {name: value for name, value in fields.items() if value != self._start[name]}
        for name in list(needed):
            without = {other: value for other, value in needed.items() if other != name}
            if self.peak(without) <= limit:
                needed = without
        return needed

    def _step(self, rematerialize: str, parts: int) -> Work:
        """Traces a step whose parts mix for themselves."""
        fields = {"learning.rematerialize": rematerialize, "learning.microbatches": parts}
        is_known = all(self._start[name] == value for name, value in fields.items())
        if self._programs is not None and is_known and not self.merge.method.mixes_once:
            return self._programs.step
        merge = self.with_fields({**fields, "learning.mix": "part"})
        learning = merge.learning()
        return programs_of(
            merge, learning, compiled=False, is_cpu=self.target.device.is_cpu, names=("step",)
        ).step

    def _expert(self, size: int) -> Work:
        if self._programs is not None and size == self._programs.expert_examples:
            return self._programs.expert
        merge = self.with_fields({"evaluation.batch_size": size})
        learning = merge.learning()
        return programs_of(
            merge, learning, compiled=False, is_cpu=self.target.device.is_cpu, names=("expert",)
        ).expert

    def _open(self, field: str, values: Sequence[Any]) -> list[Any]:
        """Returns the values of a field that are tried, of which the first is the recipe's."""
        is_open = self._fields is None or field in self._fields
        return [*dict.fromkeys(values)] if is_open else [*values[:1]]

    def _allowed(self, field: str, value: Any) -> bool:
        try:
            self.merge.changed(field, value)
        except InputError:
            return False
        return True

    def _dtypes(self) -> list[str | None]:
        """Returns the dtype of task vectors, and smaller ones."""
        now = self.merge.recipe.task_vectors.dtype
        annotation = TaskVectorsRecipe.model_fields["dtype"].annotation
        choices = [name for choice in get_args(annotation) for name in get_args(choice)]
        bits = self._bits(now)
        # bfloat16 has the range of float32, where float16 may overflow.
        smaller = [n for n in choices if self._bits(n) < bits and n != "float16"]
        return self._open("task_vectors.dtype", [now, *smaller])

    def _bits(self, dtype: str | None) -> int:
        """Returns the bits of a task vector's entry; None for those of the base."""
        if dtype is None:
            return min(8 * leaf.dtype.itemsize for leaf in self.merge.base.values())
        return 4 if dtype == "int4" else 8 * jnp.dtype(dtype).itemsize

    def _places(self) -> list[str]:
        """Returns the place of task vectors, and those beyond it that take less of the device."""
        places = ["device", "host", "disk"]
        now = self.merge.recipe.task_vectors.memory
        if self.merge.recipe.devices.model > 1:
            return [now]
        return self._open("task_vectors.memory", places[places.index(now) :])


def _last_resorts(merge: Outline) -> Iterator[tuple[str, Any]]:
    """Yields changes that cost precision, or the end of long texts."""
    recipe = merge.recipe
    if recipe.dtype is None or recipe.dtype == "float32":
        yield "dtype", "bfloat16"
    size = recipe.learning.batch_size
    yield from (("learning.batch_size", size >> n) for n in range(1, size.bit_length()))
    length = recipe.max_length
    yield from (("max_length", length >> n) for n in range(1, 16) if length >> n >= 32)


def _one_by_one(
    combinations: _Combinations, before: Sequence[Change], fields: Fields, peak: int
) -> list[Change]:
    """Returns changes in an order in which none raises the peak.

    Args:
        combinations: The combinations after the changes before.
        before: These changes.
        fields: The combination.
        peak: Its peak, traced, which the estimates of parts of it are not to be under.
    """
    order = sorted(fields, key=lambda name: name not in _PREFERRED)
    changes, done = [*before], {}
    for name in order:
        done[name] = fields[name]
        changes.append(Change(name, fields[name], combinations.peak(done), fits=False))
    if not changes:
        return []
    changes = [change._replace(peak=max(change.peak, peak)) for change in changes]
    fits = peak <= combinations.target.device.memory
    return [*changes[:-1], changes[-1]._replace(peak=peak, fits=fits)]


def _between(points: Sequence[tuple[int, Work]], examples: int) -> Work:
    """Returns the work for a number of examples, on the line through two others."""
    (most, first), (fewest, last) = points[0], points[-1]
    if most == fewest:
        return first
    share = (examples - fewest) / (most - fewest)
    kept = last.kept_bytes + share * (first.kept_bytes - last.kept_bytes)
    return first._replace(kept_bytes=int(kept))


def _halvings(factor: int) -> int:
    return factor.bit_length() - 1


def _in_words(fields: Fields) -> str:
    return ", ".join(f"{field}: {value}" for field, value in fields.items()) or "the recipe"
