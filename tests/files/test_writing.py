"""Files are whole or not there, however writing them ends."""

import os

import pytest

from adamerge_jax.files import writing
from adamerge_jax.files.writing import partial_path, remove_folder, remove_partial, write_whole


class Killed(BaseException):
    """What stands for a signal that cannot be caught."""


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_file_that_is_not_written_is_as_it_was(place, tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    write_whole(file, "before")

    def fail(*_):
        raise Killed

    owner = {"fsync": writing.os, "replace": writing.Path}[place]
    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(Killed):
        write_whole(file, "after")
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_names_may_be_as_long_as_they_can(tmp_path):
    for name in ("a" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127):
        write_whole(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


def test_what_killed_processes_leave_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "report").mkdir()
    for target in ("recipe.yaml", "report/curves.png"):
        write_whole(tmp_path / target, target)
        partial_path(tmp_path / target).touch()
    partial_path(tmp_path / "checkpoint").mkdir()
    (tmp_path / "orbax.orbax-checkpoint-tmp-12").mkdir()
    remove_partial(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["recipe.yaml", "report", "report/curves.png"]


def test_a_folder_is_never_removed_in_part(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    (folder / "learning").mkdir(parents=True)

    def fail(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(writing.shutil, "rmtree", fail)
        with pytest.raises(Killed):
            remove_folder(folder)
    assert not folder.exists()
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == []
    remove_folder(folder)  # that it is not there is fine
