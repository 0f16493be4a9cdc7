import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml

from adamerge_jax.data.images import ImageProcessor
from adamerge_jax.data.locations import HubDataset, is_on_hub, locate_data
from adamerge_jax.data.sources import load_examples
from adamerge_jax.data.tables import read_table
from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import DataSource
from tests.references import save_image, write_json_lines


def read(root: Path, path: str, wanted: tuple[str, ...] = ("text", "label"), **fields: Any):
    source = DataSource(path=path, **fields)
    return read_table(locate_data(source, root), source, "data", wanted).rows


def texts(root: Path, path: str, **fields: Any) -> list[str]:
    return list(read(root, path, **fields)["text"])


def table(first: str, count: int = 2) -> pa.Table:
    return pa.table({"text": [f"{first}{row}" for row in range(count)], "label": range(count)})


def write_parquet(file: Path, first: str, count: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(first, count), file)


def images(folder: Path, *files: str) -> None:
    """Images whose one colour is their place in the list."""
    for number, file in enumerate(files):
        save_image(folder / file, np.full((4, 4, 3), number))


def load_images(root: Path, **fields: Any):
    def preprocess(images: Any, return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": [np.array(image).transpose(2, 0, 1) for image in images]}

    return load_examples(
        DataSource(path="images", **fields),
        root=root,
        inputs=("pixel_values",),
        preprocessor=ImageProcessor(preprocess, (3, 4, 4)),
        max_length=0,
        seed=0,
        name="data",
    )


def colours(examples: Any) -> list[int]:
    return examples.take(np.arange(len(examples)), 0)["pixel_values"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.JSONL", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.txt", "d.jsonl.gz"]
)
def test_files_of_texts(tmp_path, name):
    lines = {"csv": "text,label\na,0\n", "tsv": "text\tlabel\na\t0\n", "txt": "a\n"}
    content = lines.get(name[2:], '{"text": "a", "label": 0}\n').encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts(tmp_path, name, label="label") == ["a"]
    # A folder with one table is that table.
    assert texts(tmp_path.parent, tmp_path.name) == ["a"]


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream, None])
def test_arrow_files(tmp_path, write):
    if write is None:
        write_parquet(tmp_path / "d.Parquet", "a", 600)
    else:
        with write(str(tmp_path / "d.arrow"), table("").schema) as writer:
            writer.write_table(table("a", 300))
            writer.write_table(table("b", 300))
    file = next(tmp_path.iterdir()).name
    rows = read(tmp_path, file)
    assert len(rows) == 600 and rows["text"][299] == "a299" and len(list(rows["text"])) == 600
    source = DataSource(path=file)
    location = locate_data(source, tmp_path)
    some = read_table(location, source, "x", ["text"], lambda size: np.array([1, size - 1])).rows
    assert list(some["text"]) == [rows["text"][1], rows["text"][599]]
    assert some.numbers == [1, 599] and set(some.column_names) == {"text", "label"}


def test_edited_files_of_the_same_time(tmp_path):
    for name, write in (("d.parquet", write_parquet), ("d.jsonl", write_one)):
        write(tmp_path / name, "a")
        stat = (tmp_path / name).stat()
        assert texts(tmp_path, name)[0].startswith("a")
        write(tmp_path / name, "b")
        os.utime(tmp_path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert texts(tmp_path, name)[0].startswith("b")


def write_one(file: Path, text: str) -> None:
    write_json_lines(file, [{"text": text, "label": 0}])


def test_limits_draw_the_same_rows_of_every_kind(tmp_path):
    write_json_lines(tmp_path / "d.jsonl", table("a", 50).to_pylist())
    write_parquet(tmp_path / "d.parquet", "a", 50)
    expected = np.sort(np.random.default_rng(3).permutation(50)[:7]).tolist()
    for name in ("d.jsonl", "d.parquet"):
        source = DataSource(path=name)
        location = locate_data(source, tmp_path)

        def draw(size: int) -> np.ndarray:
            return np.sort(np.random.default_rng(3).permutation(size)[:7])

        rows = read_table(location, source, "data", ["text"], draw).rows
        assert list(rows["text"]) == [f"a{row}" for row in expected]
        assert list(rows.numbers) == expected


def saved(rows: int = 3, first: str = "a") -> datasets.Dataset:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes", "so"])
    )
    return datasets.Dataset.from_dict(table(first, rows).to_pydict(), features=features)


def test_folders_of_save_to_disk(tmp_path):
    saved().select([2, 0]).save_to_disk(tmp_path / "one")
    assert texts(tmp_path, "one") == ["a2", "a0"]
    assert read(tmp_path, "one").class_names == {"label": ["no", "yes", "so"]}
    splits = datasets.DatasetDict({"train": saved(), "val": saved(2, "b")})
    splits.save_to_disk(tmp_path / "splits")
    assert texts(tmp_path, "splits") == ["a0", "a1", "a2"]
    assert texts(tmp_path, "splits", split="validation") == ["b0", "b1"]
    with pytest.raises(InputError, match="no split 'test'; its splits are train, val"):
        texts(tmp_path, "splits", split="test")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "none.arrow", 5])
def test_saved_data_name_files_in_their_folder_only(tmp_path, name):
    saved().save_to_disk(tmp_path / "one")
    (tmp_path / "one/data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = json.loads((tmp_path / "one/state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "one/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="which is no file in the folder"):
        texts(tmp_path, "one")


def test_reading_saved_data_writes_nothing_beside_them(tmp_path):
    saved().save_to_disk(tmp_path / "one")
    before = sorted(tmp_path.rglob("*"))
    assert texts(tmp_path, "one") == ["a0", "a1", "a2"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_text_that_a_file_has_once_and_rows_a_million_times(tmp_path, monkeypatch, store_schema):
    monkeypatch.setattr("adamerge_jax.data.arrow_tables._BYTES_AT_ONCE", 10**6)
    monkeypatch.setattr("adamerge_jax.data.tables._MOST_CHARACTERS", 10**6)
    once = pa.DictionaryArray.from_arrays(
        pa.array([0] * 10**5, pa.int32()), pa.array(["w" * 10**5])
    )
    file = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"text": once}), file, store_schema=store_schema)
    source = DataSource(path=str(file))
    message = "11 rows; give limit|100 times as large without compression"
    with pytest.raises(InputError, match=message):
        read_table(locate_data(source, tmp_path), source, "data", ["text"]).texts("text")


def test_more_rows_than_a_file_can_hold(tmp_path):
    ends, values = pa.array([10**9], pa.int64()), pa.array(["w"])
    table = pa.table({"text": pa.RunEndEncodedArray.from_arrays(ends, values)})
    with pa.ipc.new_file(tmp_path / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="says that it has 1,000,000,000 rows in"):
        texts(tmp_path, "data.arrow")


def test_clones_of_data_set_repositories(tmp_path, caplog):
    fields = {
        "configs": [
            {
                "config_name": "de",
                "data_files": [{"split": "train", "path": "de/train-*"}],
            },
            {
                "config_name": "en",
                "default": True,
                "data_files": [
                    {"split": "train", "path": ["en/first/*.parquet"]},
                    {"split": "test", "path": "en/other.jsonl"},
                ],
            },
        ],
        "dataset_info": {
            "config_name": "en",
            "features": [
                {"name": "text", "dtype": "string"},
                {"name": "label", "dtype": {"class_label": {"names": {"0": "no", "1": "yes"}}}},
            ],
            "splits": [{"name": "train", "num_examples": 5}],
        },
    }
    clone = tmp_path / "clone"
    write_parquet(clone / "de/train-00000-of-00002.parquet", "d", 2)
    write_parquet(clone / "de/train-00001-of-00002.parquet", "e", 1)
    write_parquet(clone / "en/first/part.parquet", "t", 3)
    write_one(clone / "en/other.jsonl", "o")
    save_image(clone / "figure.png", np.zeros((4, 4, 3)))
    (clone / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n# Data\n")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path, "clone") == ["t0", "t1", "t2"]
    assert "has 3 rows, the README.md of the data set tells of 5" in caplog.text
    assert read(tmp_path, "clone").class_names == {"label": ["no", "yes"]}
    assert texts(tmp_path, "clone", split="test") == ["o"]
    assert texts(tmp_path, "clone", config="de") == ["d0", "d1", "e0"]
    (clone / "de/train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="train is in 2 files, of which 1 are there: number 0"):
        texts(tmp_path, "clone", config="de")
    with pytest.raises(InputError, match="has the configurations de, en; give one"):
        texts(tmp_path, "clone", config="fr")
    with pytest.raises(InputError, match="no files for split 'validation'; its splits are train"):
        texts(tmp_path, "clone", split="validation")


@pytest.mark.parametrize("pattern", ["../*.parquet", "/etc/*", "hf://datasets/a/b/x.parquet"])
def test_cards_name_files_in_their_folder_only(tmp_path, pattern):
    write_parquet(tmp_path / "secret.parquet", "s")
    (tmp_path / "clone").mkdir()
    card = {"configs": [{"config_name": "default", "data_files": pattern}]}
    (tmp_path / "clone/README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    with pytest.raises(InputError, match="which is not in the folder"):
        texts(tmp_path, "clone")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (LAUGHS + "configs: [{config_name: *a59, data_files: a.jsonl}]", "more than 500,000"),
        ("a: " + "[" * 5000, "nested deeper than 50 levels"),
        (f"configs: [{{config_name: 0x{'f' * 9000}, data_files: a.jsonl}}]", "too long for a"),
        ("configs: [{data_files: 5}]", "no files for split 'train'; its splits are none"),
        ("configs: [{data_files: [null]}]", "no files for split 'train'; its splits are none"),
        ("configs: [{data_files: {train: [[a]]}}]", "no files for split 'train'"),
        ("configs: [{data_files: {2023: a.jsonl}}]", "no files for split .*; its splits are 2023"),
        ("configs: [{data_files: ['']}]", "no files for split 'train'"),
        ("configs: [{data_files: 'a**b'}]", r"is no pattern of files \(Invalid pattern"),
        (f"configs: [{{data_files: '{'**/' * 200}a.jsonl'}}]", r"it has more than 2 \*\*"),
        (
            "configs: [{data_files: a.jsonl}]\ndataset_info: {features: [{name: label, "
            "dtype: {class_label: {names: {no: a, yes: b}}}}]}",
            "names classes by other keys than their numbers",
        ),
    ],
)
def test_cards_that_say_nothing_or_too_much_are_refused(tmp_path, metadata, message):
    write_one(tmp_path / "clone/a.jsonl", "o")
    (tmp_path / "clone/README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(InputError, match=message):
        texts(tmp_path, "clone")


def test_tables_named_by_split(tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", split[0])
    assert texts(tmp_path, ".") == ["t0", "t1"]
    assert texts(tmp_path, ".", split="val") == ["v0", "v1"]
    with pytest.raises(InputError, match="no split 'test'; its tables are of train, validation"):
        texts(tmp_path, ".", split="test")
    write_parquet(tmp_path / "more/train.parquet", "m")
    with pytest.raises(InputError, match=r"is several tables: .*; give one of them"):
        texts(tmp_path, ".")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jsonl", "b.jsonl"], r"holds several tables: a.jsonl, b.jsonl; give one of them"),
        (["a.pdf", "b.docx"], "holds neither tables nor images: it holds a.pdf, b.docx"),
        ([], "holds neither tables nor images: it is empty"),
        (["train-00000-of-00001.jsonl", "figure.png"], "holds images .* and tables"),
    ],
)
def test_folders_that_are_no_data(tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    for name in files:
        write_one(tmp_path / "folder" / name, "a")
    with pytest.raises(InputError, match=message):
        texts(tmp_path, "folder")


def test_pointers_of_git_lfs(tmp_path):
    (tmp_path / "d.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(InputError, match=r"pointer of Git LFS, .*git lfs pull"):
        texts(tmp_path, "d.parquet")


def test_duplicated_columns_of_arrow(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(InputError, match="the column 'text' twice"):
        texts(tmp_path, "d.parquet")


def test_damaged_arrow_files(tmp_path):
    schema = table("").schema
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), schema) as writer:
        writer.write_table(table("abc", 100))
    content = (tmp_path / "d.arrow").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in generator.integers(8, len(content), 5):
            damaged[place] = generator.integers(256)
        (tmp_path / "d.arrow").write_bytes(damaged)
        try:
            list(read(tmp_path, "d.arrow")["text"])
        except InputError as error:
            assert "\n" not in str(error)


# Names of classes and of files that hold the word of a split, alone or within.
@pytest.mark.parametrize(
    "classes", [["abbey", "train_interior", "train_railway", "zoo"], ["bus", "test", "train"]]
)
@pytest.mark.parametrize("below", ["", "train/", "Validation/"])
@pytest.mark.parametrize("name", ["{}.png", "ILSVRC2012_val_{:08d}.png", "test-{}.JPG"])
def test_names_with_the_words_of_splits(tmp_path, classes, below, name):
    files = [f"{below}{c}/{name.format(number)}" for c in classes for number in (0, 1)]
    images(tmp_path / "images", *files)
    examples = load_images(tmp_path, label="label", split=below[:-1].lower() or "train")
    assert examples.class_names == [c.replace("_", " ") for c in classes]
    assert examples.labels.tolist() == [index for index in range(len(classes)) for _ in range(2)]
    assert len(colours(examples)) == len(files)


def test_splits_of_images(tmp_path):
    images(
        tmp_path / "images", "train/b/0.png", "train/a/1.png", "val/c/2.png", "val/a/.hidden.png"
    )
    assert colours(load_images(tmp_path)) == [1, 0]
    assert colours(load_images(tmp_path, split="validation")) == [2]
    with pytest.raises(InputError, match="no folder for split 'test'; its folders are train, val"):
        load_images(tmp_path, split="test")


def test_images_without_classes_and_other_files(tmp_path, caplog):
    images(tmp_path / "images", "1.png", "0.JPEG")
    (tmp_path / "images/notes.doc").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(load_images(tmp_path)) == 2
    assert "no image and left out: notes.doc" in caplog.text
    with pytest.raises(InputError, match="has no column 'label'; its columns are image"):
        load_images(tmp_path, label="label")
    images(tmp_path / "images", "cat/2.png")
    with pytest.raises(InputError, match=r"images lie in .*; expected images in folders named by"):
        load_images(tmp_path)


def test_folders_named_by_numbers(tmp_path, caplog):
    images(tmp_path / "images", *(f"{number}/0.png" for number in range(11)))
    with caplog.at_level(logging.WARNING):
        assert load_images(tmp_path, label="label").class_names[:3] == ["0", "1", "10"]
    assert "sorted as texts: the folder '10' is class 2" in caplog.text


def test_a_table_of_images(tmp_path, caplog):
    images(tmp_path / "images", "a/0.png", "1.png", "2.png")
    rows = [{"file_name": "2.png", "kind": "x"}, {"file_name": "a/0.png", "kind": "y"}]
    write_json_lines(tmp_path / "images/metadata.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        examples = load_images(tmp_path, label="kind")
    assert "names 2 of the 3 images" in caplog.text
    assert colours(examples) == [2, 0]
    assert (examples.class_names, examples.labels.tolist()) == (["x", "y"], [0, 1])
    write_json_lines(tmp_path / "images/metadata.jsonl", [{"file_name": "../secret.png"}])
    with pytest.raises(InputError, match=r"row 0: there is no image '../secret.png'"):
        load_images(tmp_path)


def test_tables_with_images_in_them(tmp_path):
    images(tmp_path, "0.png", "1.png", "2.png")
    column = [{"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None} for n in range(3)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    whole = datasets.Dataset.from_dict({"image": column, "label": [0, 1, 1]}, features=features)
    (tmp_path / "images").mkdir()
    whole.to_parquet(tmp_path / "images/train.parquet")
    for _ in range(2):
        examples = load_images(tmp_path, label="label")
        assert colours(examples) == [0, 1, 2]
        assert (examples.class_names, examples.labels.tolist()) == (["a", "b"], [0, 1, 1])
        limited = load_images(tmp_path, label="label", limit=2)
        assert [0, 1, 1][colours(limited)[1]] == limited.labels[1]
        (tmp_path / "images/train.parquet").unlink(missing_ok=True)
        whole.save_to_disk(tmp_path / "images")


@pytest.mark.parametrize(
    "path",
    [
        *("data/none.jsonl", "/abs/none", "./none", "a/b/c", "none.PARQUET", "x/none.jsonl.gz"),
        *("~/none", "there/none", "photos.zip", "a b"),
    ],
)
def test_paths_that_do_not_exist(tmp_path, path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="no such file or folder: "):
        locate_data(DataSource(path=path), tmp_path)
    assert not is_on_hub(DataSource(path=path), tmp_path)


@pytest.mark.parametrize("path", ["imdb", "org/name", "org/name-2.0", "Org.x/data_set"])
def test_data_sets_of_the_hub(tmp_path, path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or saved())
    rows = read(tmp_path, path, split="test", config="en", revision="v1")
    assert asked == [((path, "en"), {"split": "test", "revision": "v1"})]
    assert list(rows["text"]) == ["a0", "a1", "a2"]
    assert rows.class_names == {"label": ["no", "yes", "so"]}


def test_the_hub_and_folders_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    source = DataSource(path="org/name", revision="main")
    assert locate_data(source, tmp_path) == HubDataset("org/name")
    (tmp_path / "elsewhere/org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="in the current directory"):
        locate_data(source, tmp_path)
    (tmp_path / "org/name").mkdir()
    with pytest.raises(InputError, match="so it has no revision 'main'"):
        locate_data(source, tmp_path)


@pytest.mark.parametrize("name", ["d.xlsx", "d.parquet.gz", "d.png", "d", "d.npy"])
def test_files_of_other_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"{name} is no table: "):
        locate_data(DataSource(path=name), tmp_path)


def test_numbers_in_a_column_of_text_of_a_csv_are_texts(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n007,1\n1e5,0\n")
    rows = read(tmp_path, "d.csv", label="label")
    assert (list(rows["text"]), list(rows["label"])) == (["007", "1e5"], [1, 0])


def test_splits_of_what_is_not_divided(tmp_path):
    write_parquet(tmp_path / "one.parquet", "o")
    assert texts(tmp_path, "one.parquet", split="training") == texts(tmp_path, "one.parquet")
    with pytest.raises(InputError, match="not divided into splits, so it has no split 'test'"):
        texts(tmp_path, "one.parquet", split="test")
    save_image(tmp_path / "images" / "cat" / "1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="not divided into splits, so it has no split 'test'"):
        load_images(tmp_path, split="test")
