"""A merge on its way to the Hub, whose client is stood in for where a network would begin."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.publishing.card import published_card
from adamerge_jax.publishing.push import plan_upload, push
from adamerge_jax.runs.results import Results, write_results
from adamerge_jax.runs.rows import Row

CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- merge
---

# Merged model

model = AutoModel.from_pretrained("PATH", subfolder="tasks/law")
"""

RESULTS = Results.of_rows(
    [Row("base", {"law": 0.5, "topic": 0.25}), Row("learned", {"law": 0.75, "topic": float("nan")})]
)


class FakeHub:
    """The calls of `HfApi` that an upload makes, and what they were given."""

    def __init__(self, files: list[str] | None = None, error: Exception | None = None):
        self.files, self.error = files, error
        self.made: dict[str, Any] = {}
        self.uploaded: dict[str, bytes] = {}

    def repo_exists(self, repo_id: str) -> bool:
        return self.files is not None

    def list_repo_files(self, repo_id: str) -> list[str]:
        return self.files

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.made = {"id": repo_id, **options}

    def create_commit(self, repo_id: str, operations: list, commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        for operation in operations:
            with operation.as_file() as stream:
                self.uploaded[operation.path_in_repo] = stream.read()
        return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {
        "checkpoint/README.md": CARD,
        "checkpoint/config.json": "{}",
        "checkpoint/model.safetensors": "weights",
        "checkpoint/.cache/secret": "no",
        "checkpoint/tasks/law/model.safetensors": "weights",
        "coefficients.safetensors": "coefficients",
        "recipe.yaml": yaml.safe_dump({"base": {"path": "/home/me/base"}}),
        "run.json": "{}",
        "metrics.jsonl": "",
        "orbax/weights": "again",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    write_results(RESULTS, tmp_path / "results.json")
    return tmp_path


UPLOADED = [
    *("README.md", "config.json", "merge/coefficients.safetensors", "merge/recipe.yaml"),
    *("merge/results.json", "model.safetensors", "tasks/law/model.safetensors"),
]


def test_what_is_uploaded(run: Path):
    hub = FakeHub()
    upload = plan_upload(run, "me/merged")
    assert push(upload, private=True, force=False, api=hub) == "https://hub.test/me/merged/commit/1"
    assert hub.made == {"id": "me/merged", "private": True, "exist_ok": True}
    assert sorted(hub.uploaded) == UPLOADED
    assert hub.uploaded["model.safetensors"] == b"weights"
    assert upload.size == sum(map(len, hub.uploaded.values()))
    assert upload.notes == [
        "merge/recipe.yaml, the coefficients and the card name folders of this machine, such as "
        "/home/me/base"
    ]


def test_the_card_has_finite_scores_as_a_model_index():
    card = ModelCard(published_card(CARD, "me/merged", RESULTS))
    (score,) = card.data.eval_results
    assert card.data.model_name == "merged"
    assert (score.dataset_type, score.metric_type, score.metric_value) == ("law", "accuracy", 0.75)
    assert score.task_type == "text-classification"
    metadata = yaml.safe_load(card.content.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert metadata["tags"] == ["merge"]
    assert 'from_pretrained("me/merged", subfolder="tasks/law")' in card.text


def test_a_card_without_scores_has_no_model_index(run: Path):
    (run / "results.json").unlink()
    upload = plan_upload(run, "me/merged")
    assert b"model-index" not in upload.files[0].content
    assert upload.notes[0] == "the card has no scores: the merge was not evaluated"


def test_folders_of_this_machine_are_told_wherever_they_are(run: Path):
    (run / "recipe.yaml").unlink()  # as of a merge that was folded
    (run / "checkpoint/README.md").write_text(f"{CARD}\nOf `/` and `/home/me/base`.\n")
    for name, tokenizer in {".": "/home/me/law", "tasks/law": "me/law"}.items():
        file = run / "checkpoint" / name / "tokenizer_config.json"
        file.write_text(json.dumps({"pad": "/", "name_or_path": tokenizer}))
    assert plan_upload(run, "me/merged").notes == [
        "the card and the coefficients name folders of this machine, such as /home/me/base",
        "tokenizer_config.json names a folder of this machine, /home/me/law",
    ]


@pytest.mark.parametrize(
    "name", ["checkpoint/README.md", "checkpoint/notes.txt", "recipe.yaml", "results.json"]
)
def test_links_are_refused(name: str, run: Path, tmp_path_factory):
    secret = tmp_path_factory.mktemp("home") / "token"
    secret.write_text("{}")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(InputError, match=f"{name} is a link"):
        plan_upload(run, "me/merged")


def test_a_model_with_files_is_left_alone(run: Path):
    upload = plan_upload(run, "me/merged")
    hub = FakeHub([".gitattributes", "model.safetensors"])
    with pytest.raises(InputError, match=r"has 1 files, such as model\.safetensors; give another"):
        push(upload, private=True, force=False, api=hub)
    assert not hub.made and not hub.uploaded
    push(upload, private=True, force=True, api=hub)
    assert sorted(hub.uploaded) == UPLOADED
    empty = FakeHub([".gitattributes"])
    push(upload, private=False, force=False, api=empty)
    assert empty.made["private"] is False


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("403: forbidden\nfor you")])
def test_errors_of_the_hub_are_one_line(run: Path, error: Exception):
    with pytest.raises(InputError, match=r"cannot upload to me/merged: ") as caught:
        push(plan_upload(run, "me/merged"), private=True, force=False, api=FakeHub(error=error))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("repository", "message"),
    [("merged", "give the owner too"), ("a/b/c", "is no id of the Hub"), ("me/-x", "no id")],
)
def test_ids_that_cannot_be(repository: str, message: str, run: Path):
    with pytest.raises(InputError, match=message):
        plan_upload(run, repository)


def test_runs_that_are_not_ready(run: Path):
    (run / "state").mkdir()
    with pytest.raises(InputError, match="of a run that has not ended"):
        plan_upload(run, "me/merged")
    with pytest.raises(InputError, match=r"has no checkpoint/README\.md"):
        plan_upload(run / "checkpoint", "me/merged")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_command_lists_the_files_where_there_is_no_token(
    options: list[str], run: Path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token" if options else None)
    cli.main(["push", str(run), "me/merged", *options])
    printed = capsys.readouterr().out
    for name in UPLOADED:
        assert f"  {name}\n" in printed
    assert "nothing was uploaded (7 files" in printed
    assert ("hf auth login" in printed) == (not options)


def test_the_command_uploads_where_there_is_one(run: Path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    cli.main(["push", str(run), "me/merged", "--no-private"])
    assert sorted(hub.uploaded) == UPLOADED and hub.made["private"] is False
    assert "to https://hub.test/me/merged/commit/1" in capsys.readouterr().out
