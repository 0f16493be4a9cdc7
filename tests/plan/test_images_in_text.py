"""Plans of vision-language models."""

import pytest

from adamerge_jax.data.batches import calibrate
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.plan.test_plan import shapes_of
from tests.references import write_json_lines
from tests.vision_language_references import TASKS, conversation, save_vision_language


@pytest.mark.parametrize("with_images", [TASKS[:1], ()], ids=["one task", "none"])
def test_batches_of_conversations_are_those_of_learning(tmp_path, with_images):
    fields = save_vision_language(tmp_path) | {"learning": {"steps": 1, "batch_size": 2}}
    for task in set(TASKS) - set(with_images):
        rows = [conversation([], "which one is it ?", "none")] * 4
        write_json_lines(tmp_path / f"{task}.jsonl", rows)
    recipe = parse_recipe(fields)
    calibration = open_workspace(recipe, tmp_path).data.calibration
    real = next(calibrate(calibration, batch_size=2, held_out=0.25, seed=0).batches())
    planned = outline(recipe, tmp_path).batch(real.inputs["input_ids"].shape[1])
    assert ("pixel_values" in real.inputs) == bool(with_images)
    assert shapes_of(planned.inputs) == shapes_of(real.inputs)
