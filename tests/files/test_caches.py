"""The user's cache folder, and the lack of one."""

from pathlib import Path

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.files.caches import cache_folder


def test_the_folder_is_in_the_home_or_where_the_variable_says(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder("rows") == tmp_path / ".cache" / "adamerge_jax" / "rows"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("rows") == tmp_path / "cache" / "adamerge_jax" / "rows"


def test_a_user_without_a_home_is_told_the_variable(monkeypatch):
    def no_home() -> Path:  # as for an id of a container that is no user's
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="no home folder for the cache; set XDG_CACHE_HOME"):
        cache_folder("rows")
