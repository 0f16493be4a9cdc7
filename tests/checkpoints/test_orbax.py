import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adamerge_jax.checkpoints.orbax import load_parameters, save_parameters
from adamerge_jax.errors import InputError


def parameters() -> dict[str, jax.Array]:
    return {
        "bert.encoder.layer.*.output.dense.weight": jnp.arange(24.0).reshape(2, 3, 4),
        "bert.encoder.layer.*.output.dense": jnp.ones((2, 3), jnp.bfloat16),
        "classifier.weight": jnp.ones((3, 4), jnp.float16),
        "logit_scale": jnp.float32(2.5),
    }


def refused(match: str, folder, action=load_parameters) -> None:
    with pytest.raises(InputError, match=match) as caught:
        action(folder)
    assert "\n" not in str(caught.value)


def test_names_dtypes_and_values_survive(tmp_path):
    save_parameters(tmp_path / "merged", parameters())
    loaded = load_parameters(tmp_path / "merged")
    assert loaded.keys() == parameters().keys()
    for name, array in parameters().items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert os.listdir(tmp_path) == ["merged"]


def test_orbax_itself_reads_it(tmp_path):
    save_parameters(tmp_path / "merged", parameters())
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "merged").keys() == parameters().keys()


def test_folder_in_use(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").touch()
    refused("not empty", tmp_path / "merged", lambda path: save_parameters(path, parameters()))
    assert os.listdir(tmp_path / "merged") == ["precious"]


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_, path, *__):
        # Where Orbax writes before it renames.
        path.with_name(path.name + ".orbax-checkpoint-tmp").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_parameters(tmp_path / "merged", parameters())
    assert os.listdir(tmp_path) == []


def test_no_checkpoint(tmp_path):
    refused("no such folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty is not a complete checkpoint of parameters", tmp_path / "empty")


@pytest.mark.parametrize("lost", ["_METADATA", "manifest.ocdbt", "d"])
def test_incomplete_checkpoint(tmp_path, lost):
    save_parameters(tmp_path / "merged", parameters())
    path = tmp_path / "merged" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused("merged is not a complete checkpoint of parameters", tmp_path / "merged")


def test_checkpoint_of_another_structure(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nested", {"encoder": {"weight": jnp.ones(2)}})
    refused("nested is not a complete checkpoint of parameters", tmp_path / "nested")
