"""Every `model_type`, folded and learned: `python experiments/benchmarks/any_model.py [TYPE ...]`.

A tiny random model of each type of the installed `transformers` is the base; two experts differ
from it in every floating tensor.

- *Folds*: `adamerge merge --method task_arithmetic` merges them, and every tensor of the result is
  compared with the same merge in float64. A merge is equal where all tensors are there, floating
  ones differ by at most 1e-6 of their largest value (a rounding of float32), and others have the
  base's bytes.
- *Learns*: five steps of Adam by our own family or by the bridge reach the coefficients of a plain
  PyTorch loop within 1e-4, in float32 or else in float64.
- *Compiles*: the seconds of one core that the compilation of a learning step takes.

Every type has a process of its own and a time limit. Results go to `any_model.jsonl` beside this
file, a line a type. Types with a result are left out; `--again` repeats those whose result starts
with a word. `--page FILE` writes the Markdown page.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import any_model_table
import numpy as np
from rich.console import Console
from tiny_inputs import NoInputsError, tiny_inputs
from tiny_models import NotMadeError, in_short, model_class, model_types, tiny_model

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.renamed import current_name
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of, is_known
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.recipes.loading import parse_recipe

# Imported once, for all processes; none of them starts a device of JAX, which no fork survives.
PRELOADED = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "optax",
    "adamerge_jax.pipeline.run_merge",
    "adamerge_jax.models.bridge.family",
)

RESULTS = Path(__file__).with_suffix(".jsonl")

SCALE = 0.3
TOLERANCE = 1e-6
TASKS = ("first", "second")

# Those of `adamerge learn`, in the order of its choice, before classes that it has no kind for.
CLASSES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)
ENCODER_DECODERS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)


def main() -> None:
    """Merges and learns a model of each type, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--seconds", type=int, default=120, help="limit of processor time a type")
    parser.add_argument("--again", nargs="*", default=[], help="beginnings of results to repeat")
    parser.add_argument("--page", type=Path, help="the file of the Markdown page")
    arguments = parser.parse_args()
    results = any_model_table.read(arguments.out)
    types = arguments.types or sorted(model_types(), key=_urgency)
    repeated = tuple(arguments.again)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    cache = Path(tempfile.gettempdir()) / "any_model_cache"
    versions = any_model_table.installed()
    for number, model_type in enumerate(types, start=1):
        before = results.get(model_type)
        is_wanted = before is None or (
            repeated and any_model_table.in_words(before).startswith(repeated)
        )
        if is_wanted:
            result = _in_a_process(context, model_type, arguments.seconds, cache) | versions
            results[model_type] = result
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            words = any_model_table.in_words(result)
            print(
                f"{number}/{len(types)} {model_type}: {words} ({result['seconds']} s)", flush=True
            )
    any_model_table.write(arguments.out, results.values())
    done = [results[name] for name in sorted(types) if name in results]
    lines = any_model_table.page(done, len(types))
    if arguments.page is None:
        print("\n".join(lines))
    else:
        arguments.page.write_text("\n".join(lines) + "\n")


def _urgency(model_type: str) -> tuple[bool, int]:
    """Sorts types that `adamerge learn` has a kind for before others, at random among them.

    The results of a run that is not at its end are then a sample of all.
    """
    from transformers.models.auto import modeling_auto

    tables = (*CLASSES, *ENCODER_DECODERS)
    is_learned = any(model_type in getattr(modeling_auto, table) for table in tables)
    return not is_learned, zlib.crc32(model_type.encode())


def _in_a_process(
    context: multiprocessing.context.ForkServerContext,
    model_type: str,
    seconds: int,
    cache: Path,
) -> dict[str, Any]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(model_type, seconds, cache, sender))
    process.start()
    sender.close()
    result: dict[str, Any] = {"type": model_type}
    end = time.monotonic() + 10 * seconds  # a process that waits uses no processor time
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            result = receiver.recv()  # the last one is the most complete
    except EOFError:
        pass
    process.kill()
    process.join()
    if result.pop("finished", False):
        return result
    return any_model_table.timed_out(result, seconds)


def _measure(model_type: str, seconds: int, cache: Path, sender: Connection) -> None:
    """Sends the results of a type, one after each stage."""
    import resource
    import warnings

    import jax
    import transformers

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result: dict[str, Any] = {"type": model_type, "made": False}
    start = time.process_time()

    def send(**fields: Any) -> None:
        result.update(fields, seconds=round(time.process_time() - start, 1))
        sender.send(result)

    try:
        kind = model_class(model_type, _tables(model_type))
        result |= {"class": kind.__name__, "modalities": _modalities(kind)}
        send()
        model = tiny_model(model_type, kind, accepts=tiny_inputs)
    except NotMadeError as error:
        send(reason=str(error), finished=True)
        return
    send(made=True, parameters=sum(parameter.numel() for parameter in model.parameters()))
    # Merging compiles small functions whose shapes many types share; a learning step is timed.
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    send(**fold(model))
    jax.config.update("jax_enable_compilation_cache", False)
    send(**learn(model), finished=True)


def _tables(model_type: str) -> tuple[str, ...]:
    """Returns the tables in which the class of a type is looked up first."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    try:
        config = config()
    except Exception:  # whatever an architecture says of its defaults
        return CLASSES
    if is_known(config):
        by_class = {
            "AutoModelForSequenceClassification": CLASSES[2:3],
            "AutoModelForImageClassification": CLASSES[3:4],
            "AutoModelForSeq2SeqLM": ENCODER_DECODERS,
            "AutoModelForCausalLM": CLASSES[1:2],
        }
        return by_class.get(family_of(config).auto_class or "", ("MODEL_MAPPING_NAMES",))
    return ENCODER_DECODERS + CLASSES if config.is_encoder_decoder else CLASSES


def _modalities(kind: type) -> list[str]:
    modalities = kind.input_modalities
    return [modalities] if isinstance(modalities, str) else sorted(modalities)


def learn(model: Any) -> dict[str, Any]:
    """Learns a model by JAX and by PyTorch, and returns the outcome."""
    from any_model_learning import TOLERANCE as WITHIN
    from any_model_learning import NotLearnedError
    from any_model_learning import learn as learn_both

    try:
        inputs = tiny_inputs(model)
    except NoInputsError as error:
        return {"learns": f"no inputs: {error}"}
    names = {"inputs": sorted(inputs)}
    try:
        outcome = learn_both(model, inputs)
    except (NotLearnedError, InputError) as error:
        return {**names, "learns": f"refused: {' '.join(str(error).split())[:300]}"}
    except Exception as error:  # every failure is a row of the table
        return {**names, "learns": f"fails: {in_short(error)}"}
    is_equal = outcome["difference"] <= WITHIN and outcome["moved"] > 1e-2
    return {**names, **outcome, "learns": "equal" if is_equal else "differs"}


def fold(model: Any) -> dict[str, Any]:
    """Merges models of a type, and returns their tensors, and the reason if it did not work."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _merge(model, Path(folder))
    except Exception as error:  # every failure is a row of the table
        return {"folds": f"fails: {in_short(error)}"}


def _merge(model: Any, folder: Path) -> dict[str, Any]:
    import torch

    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS, start=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / task)
    model.load_state_dict(before)
    tasks = {task: {"expert": str(folder / task)} for task in TASKS}
    fields = {"base": str(folder / "base"), "tasks": tasks, "export": {"orbax": False}}
    quiet = Console(quiet=True)
    options = {"coefficient": SCALE}
    out = folder / "out"
    merge(parse_recipe(fields), "task_arithmetic", options, root=folder, out=out, console=quiet)
    base, *experts = (Checkpoint.open(folder / name) for name in ("base", *TASKS))
    checkpoint = out / "checkpoint"
    has_heads = (checkpoint / "tasks").is_dir()
    merged = [Checkpoint.open(checkpoint / "tasks" / t if has_heads else checkpoint) for t in TASKS]
    is_outside = _outside_of_merge(model.config)
    wrong = [
        name
        for name in base.tensors
        if not all(_is_merged(name, base, experts, one) for one in merged)
        and not (is_outside(name) and all(_is_kept(name, base, one) for one in merged))
        and not all(_is_kept(name, e, m) for e, m in zip(experts, merged, strict=True))
    ]
    reason = f"{wrong[0]} and {len(wrong) - 1} more differ" if wrong else "equal"
    return {"tensors": len(base.tensors), "folds": reason}


def _is_merged(name: str, base: Checkpoint, experts: list[Checkpoint], merged: Checkpoint) -> bool:
    written = name if name in merged.tensors else current_name(name)
    if written not in merged.tensors:
        return False
    before, after = base.read(name), merged.read(written)
    if before.dtype.kind in "iub":
        return np.array_equal(before, after)
    start = before.astype(np.float64)
    expected = start + SCALE * sum(expert.read(name) - start for expert in experts)
    largest = max(np.abs(expected).max(initial=0), 1.0)
    return bool(np.abs(after - expected).max(initial=0) <= TOLERANCE * largest)


def _outside_of_merge(config: Any) -> Callable[[str], bool]:
    """Returns the test for names that are no part of a merge: all but the images' of a CLIP."""
    if not (is_known(config) and family_of(config).auto_class is None):
        return lambda name: False
    return lambda name: not name.startswith(("vision_model.", "visual_projection."))


def _is_kept(name: str, expert: Checkpoint, merged: Checkpoint) -> bool:
    """Returns True for a tensor of one model that the merge has too."""
    if name not in merged.tensors:
        return False
    return np.array_equal(expert.read(name), merged.read(name))


if __name__ == "__main__":
    main()
