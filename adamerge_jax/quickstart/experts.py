"""The folder of the quickstart: base, experts, data and the recipe that merges them."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from adamerge_jax.checkpoints.folders import new_folder, require_new
from adamerge_jax.quickstart.digits import load_digits
from adamerge_jax.quickstart.tasks import TASKS, pixels, reorient, shift

_BASE_LEARNING_RATE, _EXPERT_LEARNING_RATE = 2e-3, 1e-3


def prepare(
    folder: Path | str,
    seed: int = 0,
    console: Console | None = None,
    *,
    base_steps: int = 1500,
    expert_steps: int = 500,
) -> None:
    """Trains a base and four experts of it, and writes them with their data and a recipe.

    Args:
        folder: The folder to make, with `base/`, `experts/<task>/`, `data/<task>.<part>.npz` and
            `recipe.yaml`.
        seed: The seed of all training.
        console: The console for progress; by default what the program prints to.
        base_steps: Number of steps that the base is trained for.
        expert_steps: Number of steps that each expert is trained for.

    Raises:
        InputError: The folder is in use or cannot be made.
    """
    from adamerge_jax.checkpoints.huggingface_export import save_model
    from adamerge_jax.quickstart.training import initial_parameters, make_config, make_trainer

    folder, console = Path(folder), console or Console()
    require_new(folder)
    parts, config = load_digits(), make_config()
    train = make_trainer(config, console)
    base = train(
        initial_parameters(config, seed),
        lambda generator, images: reorient(generator, shift(generator, images)),
        *parts["train"],
        base_steps,
        _BASE_LEARNING_RATE,
        np.random.default_rng([seed, 1]),
        "training the base",
    )
    experts = {
        task: train(
            base,
            lambda generator, images, change=change: change(shift(generator, images)),
            *parts["train"],
            expert_steps,
            _EXPERT_LEARNING_RATE,
            np.random.default_rng([seed, 2, number]),
            f"training {task}",
        )
        for number, (task, change) in enumerate(TASKS.items())
    }
    with new_folder(folder) as partial:
        save_model(partial / "base", config, base)
        (partial / "data").mkdir()
        for task, change in TASKS.items():
            save_model(partial / "experts" / task, config, experts[task])
            for part in ("calibration", "validation", "test"):
                images, labels = parts[part]
                np.savez(
                    partial / "data" / f"{task}.{part}.npz",
                    pixel_values=pixels(change(images)),
                    **{} if part == "calibration" else {"label": labels},
                )
        (partial / "recipe.yaml").write_text(recipe_text(seed), encoding="utf-8")
    console.print(f"base, experts, data and recipe.yaml are in {folder}/")


def recipe_text(seed: int) -> str:
    """Returns the recipe of the merge, as its file has it."""
    return yaml.safe_dump(_recipe(seed), sort_keys=False)


def _recipe(seed: int) -> dict[str, Any]:
    return {
        "name": "quickstart",
        "base": "base",
        "tasks": {
            task: {
                "expert": f"experts/{task}",
                "calibration": f"data/{task}.calibration.npz",
                "validation": {"path": f"data/{task}.validation.npz", "label": "label"},
                "test": {"path": f"data/{task}.test.npz", "label": "label"},
            }
            for task in TASKS
        },
        "seed": seed,
    }
