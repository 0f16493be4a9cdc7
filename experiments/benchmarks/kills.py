"""Runs that are killed and gone on with: `python experiments/benchmarks/kills.py [--kills N]`.

Trains nothing: a base and two experts of random weights, a vision transformer of a few thousand
parameters, are written to a temporary folder with their data. `adamerge learn` (with
export, evaluation and report) and `adamerge fold` run once undisturbed. Then each is started again
and again and gets SIGKILL, SIGTERM or SIGINT at a random moment, after which it is gone on with by
the command that it is documented to be gone on with. A third of the kills are of `learn`, which
takes longer. Of every kill

- nothing is torn: all files that have their own name are whole,
- nothing looks finished and is not: a folder without `state/` holds what an undisturbed run leaves,
- the second start ends well, with the same bits as the undisturbed run,
- nothing is left over: no file more than the undisturbed run leaves, in the folder or beside it,
- SIGTERM and SIGINT end with status 143 and 130 and say how to go on; state is kept.

The interpreter and the libraries are loaded once, without a device; each run is a fork of that.
Figures are written but not drawn.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.table import Table

PROCESSES = multiprocessing.get_context("fork")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TASKS = ("upright", "inverted")
EXAMPLES = 24
COMMANDS = ("learn", "fold")
PNG_END = b"IEND\xaeB`\x82"


class Undisturbed(NamedTuple):
    """A run that nothing happened to: its length in seconds, and what it leaves."""

    seconds: float
    files: Mapping[str, str]


class Killed(NamedTuple):
    """A run that was killed: where, and what is wrong with it."""

    command: str
    signal: signal.Signals
    place: str
    faults: list[str]


def import_libraries() -> None:
    """Imports all that a run imports; no device is opened, so that the process can be forked."""
    import datasets
    import matplotlib.figure
    import orbax.checkpoint
    import transformers

    import adamerge_jax.cli.main
    import adamerge_jax.models.vit
    import adamerge_jax.pipeline.run_learn

    # Asked for by name, they are imported.
    _ = transformers.ViTConfig, datasets.load_dataset, orbax.checkpoint
    _ = adamerge_jax.cli.main, adamerge_jax.models.vit, adamerge_jax.pipeline.run_learn

    def write_empty(figure: Any, stream: Any, format: str, **options: Any) -> None:
        stream.write(f"<svg/>{PNG_END.decode('latin1')}".encode("latin1"))

    # To draw them would be half of the time of a run.
    matplotlib.figure.Figure.savefig = write_empty


def prepare(root: Path) -> None:
    """Writes models, data and recipe."""
    import jax
    from transformers import ViTConfig

    from adamerge_jax.checkpoints.huggingface_export import save_model
    from adamerge_jax.models import family_of

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
        architectures=["ViTForImageClassification"],
    )
    family = family_of(config)
    shapes = {name: leaf.shape for name, leaf in family.build_backbone(config).shapes.items()}
    heads = {name: leaf.shape for name, leaf in family.build_head(config).shapes.items()}
    generator = np.random.default_rng(0)

    def draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return {
            n: generator.normal(0, 0.2, shape).astype(np.float32) for n, shape in shapes.items()
        }

    base = draw(shapes)
    save_model(root / "base", config, base | draw(heads))
    for task in TASKS:
        change = draw(shapes)
        expert = {name: values + 0.3 * change[name] for name, values in base.items()}
        save_model(root / task, config, expert | draw(heads))
        for part in ("calibration", "test"):
            pixels = generator.normal(size=(EXAMPLES, 3, 8, 8)).astype(np.float32)
            labels = generator.integers(0, 3, EXAMPLES)
            arrays = {"pixel_values": pixels} | ({"label": labels} if part == "test" else {})
            np.savez(root / f"{task}.{part}.npz", **arrays)
    recipe = {
        "base": "base",
        "preset": "adamerging",
        "tasks": {
            task: {
                "expert": task,
                "calibration": {"path": f"{task}.calibration.npz"},
                "test": {"path": f"{task}.test.npz", "label": "label"},
            }
            for task in TASKS
        },
        "coefficients": {"granularity": "layer"},
        "learning": {"steps": 20, "evaluate_every": 5, "batch_size": 4},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert jax.devices()


def in_a_fork(work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns, run in a process of its own."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=lambda: sender.send(work(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def run_command(arguments: list[str], log: Path) -> None:
    """Runs the command line in this process, its output in a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a new interpreter of a shell has it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    from adamerge_jax.cli.main import main

    main(arguments)


def start(arguments: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """Starts the command line in a fork."""
    process = PROCESSES.Process(target=run_command, args=(arguments, log))
    process.start()
    return process


def command_line(command: str, root: Path, out: Path) -> list[str]:
    """Returns the arguments of a command, the same at each start."""
    if command == "learn":
        return ["learn", str(root / "recipe.yaml"), "--out", str(out), "--resume"]
    coefficients = str(root / "undisturbed" / "learn" / "coefficients.safetensors")
    return ["fold", str(root / "recipe.yaml"), coefficients, "--out", str(out)]


def contents(folder: Path) -> dict[str, str]:
    """Returns what is in a folder: a digest of each file, without times and memory."""
    import tensorstore

    files = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if name.startswith("orbax/") or name == ".lock" or not file.is_file():
            continue
        content = file.read_bytes()
        if file.name == "run.json":
            record = json.loads(content)
            names = sorted(record.pop("seconds"))
            record.pop("peak_memory_bytes")
            content = json.dumps([names, record]).encode()
        elif file.name == "metrics.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([record | {"seconds": 0} for record in records]).encode()
        elif file.name == "report.html":
            content = content.rstrip()[-7:]
        files[name] = sha256(content).hexdigest()
    if (folder / "orbax").is_dir():
        arrays = {"driver": "ocdbt", "base": f"file://{folder}/orbax/"}
        store = tensorstore.KvStore.open(arrays).result()
        for key in store.list().result():
            files[f"orbax/{key.decode()}"] = sha256(store[key]).hexdigest()
    return files


def torn_files(folder: Path) -> list[str]:
    """Returns the files under their own names that are not whole."""
    torn = []
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        content = file.read_bytes()
        try:
            if file.suffix == ".json":
                json.loads(content)
            elif file.suffix == ".png":
                assert content.endswith(PNG_END)
            elif file.suffix == ".html":
                assert content.rstrip().endswith(b"</html>")
            elif file.suffix == ".safetensors":
                length = int.from_bytes(content[:8], "little")
                header = json.loads(content[8 : 8 + length])
                ends = [
                    entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"
                ]
                assert len(content) == 8 + length + max(ends)
            elif file.name == "recipe.yaml":
                assert yaml.safe_load(content)["tasks"]
        except (ValueError, AssertionError, KeyError, TypeError):
            torn.append("/".join(parts))
    return torn


def place_of(command: str, out: Path) -> str:
    """Returns where a run was when it was killed, as its folder tells it."""
    if not (out / "state").is_dir():
        return "tidying up" if (out / "checkpoint").is_dir() else "checking"
    if (out / "orbax").is_dir():
        return "evaluating, reporting" if command == "learn" else "tidying up"
    if (out / "checkpoint").is_dir() or list(out.glob(".checkpoint.partial-*")):
        return "writing"
    return "learning" if command == "learn" else "writing"


def undisturbed(command: str, root: Path) -> Undisturbed:
    """Runs a command to its end twice: the first time compiles."""
    for _ in range(2):
        out = root / "undisturbed" / command
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        process = start(command_line(command, root, out), root / "log.txt")
        process.join()
        if process.exitcode:
            raise RuntimeError((root / "log.txt").read_text())
        seconds = time.perf_counter() - began
    return Undisturbed(seconds, in_a_fork(contents, out))


def kill_once(
    command: str, number: signal.Signals, moment: float, root: Path, expected: Undisturbed
) -> Killed | None:
    """Kills a run and goes on with it; None if the run ended before the moment came."""
    parent = root / "killed"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir()
    out, log = parent / command, root / "log.txt"
    arguments = command_line(command, root, out)
    process = start(arguments, log)
    process.join(moment)
    if process.exitcode is not None:
        return None
    os.kill(process.pid, number)
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Killed(command, number, "?", [f"{number.name} was not followed within 60 s"])
    place, faults = place_of(command, out), []
    faults += [f"torn: {name}" for name in torn_files(out)]
    # Before Python has its handlers, the system ends a process.
    if process.exitcode not in (0, -number, 128 + number):
        faults.append(f"exit status {process.exitcode}: {log.read_text()[-300:]}")
    if process.exitcode == 128 + number and "adamerge" not in log.read_text():
        faults.append("no word on how to go on")
    saved = list(out.glob("state/*/snapshot.safetensors"))
    steps_taken = (out / "metrics.jsonl").is_file()
    if process.exitcode == 128 + number and place == "learning" and steps_taken and not saved:
        faults.append("no state was kept")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names - {".lock"} and "state" not in names:
        found = {
            name: digest for name, digest in in_a_fork(contents, out).items() if name[0] != "."
        }
        if found != expected.files:
            faults.append(f"looks finished and is not: {sorted(names)}")
    again = start(arguments, log)
    again.join(120)
    if again.exitcode != 0 and not (command == "fold" and place == "tidying up"):
        again.kill()
        faults.append(f"second start: status {again.exitcode}: {log.read_text()[-300:]}")
    found = in_a_fork(contents, out)
    if differing := sorted(
        name for name in {*found, *expected.files} if found.get(name) != expected.files.get(name)
    ):
        faults.append(f"other bits, or files: {differing}")
    leftovers = [str(path) for path in parent.rglob(".*")] + [
        path.name for path in parent.iterdir() if path != out
    ]
    if leftovers:
        faults.append(f"left over: {leftovers}")
    return Killed(command, number, place, faults)


def main() -> None:
    """Kills runs and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of commands, signals and moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        import_libraries()
        from adamerge_jax.cli.console import make_console

        console = make_console(width=150)
        in_a_fork(prepare, root)
        expected = {command: undisturbed(command, root) for command in COMMANDS}
        console.print(
            *(f"{name}: {run.seconds:.1f} s undisturbed" for name, run in expected.items()),
            sep="\n",
        )
        draw = random.Random(arguments.seed)
        killed: list[Killed] = []
        while len(killed) < arguments.kills:
            if len(killed) % 20 == 0:
                print_table(killed, console)
            turn = len(killed)
            number, command = SIGNALS[turn % 3], COMMANDS[turn // 3 % 3 > 0]
            moment = draw.uniform(0, 1.05 * expected[command].seconds)
            run = kill_once(command, number, moment, root, expected[command])
            if run is None:
                continue
            killed.append(run)
            for fault in run.faults:
                console.print(f"{turn}: {command}, {number.name}, {run.place}: {fault:.400}")
        print_table(killed, console)
    sys.exit(any(run.faults for run in killed))


def print_table(killed: list[Killed], console: Any) -> None:
    """Prints kills and faults by command and signal."""
    places = list(dict.fromkeys(run.place for run in killed))
    groups: dict[tuple[str, str], list[Killed]] = defaultdict(list)
    for run in killed:
        groups[run.command, run.signal.name].append(run)
    table = Table(title=f"{len(killed)} kills, each gone on with")
    for column in ("command", "signal", "kills", *places, "faults"):
        table.add_column(column, justify="left" if column in ("command", "signal") else "right")
    for (command, name), runs in sorted(groups.items()):
        counts = Counter(run.place for run in runs)
        faulty = sum(bool(run.faults) for run in runs)
        numbers = [len(runs), *(counts[place] for place in places), faulty]
        table.add_row(command, name, *map(str, numbers))
    console.print(table)


if __name__ == "__main__":
    main()
