"""Layouts of data: each is made of empty files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adamerge_jax.drafting.data_files import data_of_one, find_data
from adamerge_jax.errors import InputError

ALL = {
    "trec": {"calibration": "1", "validation": "2", "test": "3"},
    "sst2": {"calibration": "4", "test": "5"},
}
"""The parts of two tasks; numbers stand for files below."""


@pytest.mark.parametrize(
    ("tasks", "files"),
    [
        (
            ("trec", "sst2"),
            [
                *("trec.calibration.jsonl", "trec.fewshot.jsonl", "trec.test.jsonl"),
                *("sst2.calibration.jsonl", "sst2.test.jsonl"),
            ],
        ),
        (
            ("trec", "sst2"),
            [
                *("trec/train.csv", "trec/dev.csv.gz", "trec/test.parquet"),
                *("sst2/train.csv", "sst2/test.csv"),
            ],
        ),
        (
            ("trec", "sst2"),
            [
                *("train/trec.npz", "validation/trec.npz", "test/trec.npz"),
                *("train/sst2.npz", "test/sst2.npz"),
            ],
        ),
        (
            ("bert-base-trec", "bert-base-sst2"),
            ["trec.json", "trec_val.json", "trec_test.json", "sst2.json", "sst2-eval.json"],
        ),
        (
            ("trec", "sst2"),
            [
                *("trec/unlabeled/a/1.png", "trec/val/a/2.png", "trec/test/a/3.png"),
                *("sst2/train/x/4.png", "sst2/test/x/5.png"),
            ],
        ),
    ],
    ids=["files", "folders of tasks", "folders of parts", "common words", "images"],
)
def test_layouts(tasks: tuple[str, str], files: list[str], tmp_path: Path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "other.jsonl").touch()
    found = find_data(tasks, [tmp_path])
    for task, parts in zip(tasks, ALL.values(), strict=True):
        assert set(found[task]) == set(parts)
        for part, number in parts.items():
            path, split = found[task][part]
            expected = tmp_path / files[int(number) - 1]
            if expected.suffix == ".png":
                # A folder with splits in it, or the folder of a part that is none.
                folder = Path(path) / split if split else Path(path)
                assert folder == expected.parents[1]
            else:
                assert (Path(path), split) == (expected, None)


def test_the_best_word_is_taken_and_the_task_with_more_words(tmp_path: Path):
    for name in ("law.train", "law.calibration", "law_us.train", "law.calibration.old"):
        (tmp_path / f"{name}.jsonl").touch()
    found = find_data(["law", "law_us"], [tmp_path])
    assert Path(found["law"]["calibration"].path).name == "law.calibration.jsonl"
    assert Path(found["law_us"]["calibration"].path).name == "law_us.train.jsonl"


def test_a_saved_data_set_has_its_splits(tmp_path: Path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    found = find_data(["law"], [tmp_path])["law"]
    folder = str(tmp_path / "law")
    assert found == {"calibration": (folder, "train"), "test": (folder, "test")}
    assert data_of_one(folder) == found
    assert data_of_one("org/law")["calibration"] == ("org/law", "train")


def test_missing_data_are_told(tmp_path: Path):
    with pytest.raises(InputError, match="--data: no such file or folder: "):
        find_data(["law"], [tmp_path / "data"])
    assert find_data(["law"], [tmp_path]) == {}


def test_a_folder_that_may_not_be_listed_is_passed_over(tmp_path: Path, monkeypatch, caplog):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "law.train.jsonl").touch()
    list_folder = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:  # a test run by root may list any folder
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return list_folder(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert set(find_data(["law"], [tmp_path])["law"]) == {"calibration"}
    assert "lost+found cannot be looked through: Permission denied" in caplog.text
