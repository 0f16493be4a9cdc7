"""The printed form of a plan."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adamerge_jax.checkpoints.folders import readable_size
from adamerge_jax.plan.prediction import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Prints sizes, memory, time, and the advised changes."""
    console.print(Group(_sizes(plan), _memory(plan), _time(plan)))
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(_verdict(plan), soft_wrap=True)
    for change in plan.changes:
        enough = "fits" if change.fits else "not enough yet"
        console.print(
            f"  {change.field}: {change.value}  -> {readable_size(change.peak)}, {enough}",
            highlight=False,
            soft_wrap=True,
        )


def _sizes(plan: Plan) -> Table:
    table = Table(title="Merge", show_header=False, title_justify="left")
    unmerged = plan.parameters - plan.merged
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("merged, kept from the base", f"{plan.merged:,}, {unmerged:,}")
    table.add_row("learned", plan.coefficients)
    table.add_row("written to disk", readable_size(plan.disk))
    return table


def _memory(plan: Plan) -> Table:
    origin = "the compiler's figures" if plan.compiled else "estimated from the trace"
    table = Table(title=f"Memory (activations: {origin})", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, size in plan.memory.parts.items():
        table.add_row(name, readable_size(size))
    table.add_section()
    shared = plan.device.is_cpu
    for phase in plan.memory.phases:
        host = phase.host + shared * phase.device + plan.memory.floor
        device = "" if shared else f"{readable_size(phase.device)} on the device, "
        table.add_row(f"peak while {phase.name}", f"{device}{readable_size(host)} on the host")
    table.caption = f"{readable_size(plan.host_limit)} of this machine's memory are free"
    return table


def _time(plan: Plan) -> Table:
    table = Table(title=f"Time on {plan.device.name}", title_justify="left", show_header=False)
    step = plan.programs.step
    table.add_row("floating-point operations per step", f"{step.flops / 1e12:.3g} TFLOP")
    table.add_row("memory moved per step", readable_size(int(step.moved_bytes)))
    table.add_row("one step", _duration(plan.seconds.step))
    for name in (*plan.seconds._fields[1:], "total"):
        title = name.replace("_", " ").replace("held out", "held-out")
        table.add_row(title, _duration(getattr(plan.seconds, name)))
    if plan.device.attainable < 1:
        table.caption = f"at {plan.device.attainable:.0%} of the maker's figures"
    return table


def _verdict(plan: Plan) -> Text:
    sizes = f"{readable_size(plan.peak)} of {readable_size(plan.device.memory)}"
    if plan.fits:
        return Text(f"fits: peak {sizes} on {plan.device.name}", style="bold green")
    if not plan.changes:
        return Text(
            f"does not fit: peak {sizes} on {plan.device.name}; no field of the recipe lowers it, "
            "take a larger device or fewer experts",
            style="bold red",
        )
    return Text(
        f"does not fit: peak {sizes} on {plan.device.name}; change, one after the other:",
        style="bold red",
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
