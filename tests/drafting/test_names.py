from pathlib import Path

import pytest

from adamerge_jax.checkpoints.folders import require_task_name
from adamerge_jax.drafting.names import expand, task_names
from adamerge_jax.errors import InputError


@pytest.mark.parametrize(
    ("experts", "names"),
    [
        (["experts/trec", "experts/sst2"], ["trec", "sst2"]),
        (["runs/law/checkpoint-500", "runs/code/final_model"], ["law", "code"]),
        (["law/v2", "code/v2"], ["law-v2", "code-v2"]),
        (["my-org/qwen-code-lora", "my-org/qwen-law"], ["qwen-code-lora", "qwen-law"]),
        (["a/model.gguf", "b/other.gguf"], ["a", "other"]),
        (["x/two words", "x/base"], ["two-words", "base-task"]),
        (["checkpoint-1"], ["checkpoint-1"]),
    ],
)
def test_tasks_are_called_as_folders_that_say_something(experts, names):
    assert task_names(experts) == names
    for name in names:
        require_task_name(name)


def test_an_expert_given_twice_is_refused():
    with pytest.raises(InputError, match="experts/law is given twice"):
        task_names(["experts/law", "experts/law"])


def test_a_folder_of_experts_stands_for_them(tmp_path: Path):
    for name, file in {"law": "config.json", "code": "adapter_config.json"}.items():
        (tmp_path / "experts" / name).mkdir(parents=True)
        (tmp_path / "experts" / name / file).touch()
    (tmp_path / "experts" / "notes").mkdir()
    folder = str(tmp_path / "experts")
    assert expand([folder, "org/name"]) == [f"{folder}/code", f"{folder}/law", "org/name"]
    # The checkpoints of one run are not experts of several tasks.
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-10" / "config.json").touch()
    assert expand([str(tmp_path / "run")]) == [str(tmp_path / "run")]
