import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import BertConfig, CLIPConfig, ViTConfig

from adamerge_jax.coefficients import (
    CONSTRAINTS,
    GRANULARITIES,
    Coefficients,
    Source,
    layer_of,
    unstack_values,
)
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from tests.references import unstacked_shapes

SHAPES = {
    "bert.embeddings.word_embeddings.weight": (7, 4),
    "bert.encoder.layer.*.output.dense.weight": (2, 4, 4),
    "bert.encoder.layer.*.output.dense.bias": (2, 4),
    "bert.pooler.dense.bias": (4,),
}
UNSTACKED = {
    "bert.embeddings.word_embeddings.weight": (7, 4),
    "bert.encoder.layer.0.output.dense.weight": (4, 4),
    "bert.encoder.layer.1.output.dense.weight": (4, 4),
    "bert.encoder.layer.0.output.dense.bias": (4,),
    "bert.encoder.layer.1.output.dense.bias": (4,),
    "bert.pooler.dense.bias": (4,),
}

COEFFICIENTS = Coefficients(
    values={name: np.full(3, index, np.float32) for index, name in enumerate(UNSTACKED)},
    granularity="tensor",
    constraint="clip",
    parameters=tuple(UNSTACKED),
    base=Source("base", "org/base", "v1", "sha256:0"),
    experts=tuple(Source(f"t{k}", f"experts/t{k}", None, f"sha256:{k}") for k in range(3)),
    objective="entropy",
    seed=7,
    step=40,
)


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("task", {"all": 1}),
        (
            "layer",
            {"bert.embeddings": 1, "bert.encoder.layer.*": 2, "bert.pooler": 1},
        ),
        ("tensor", {name: 2 if "*" in name else 1 for name in SHAPES}),
    ],
)
def test_groups(granularity, groups):
    values = GRANULARITIES[granularity](SHAPES).init(3, 0.3)
    assert {group: array.shape for group, array in values.items()} == {
        group: (size, 3) for group, size in groups.items()
    }
    for array in values.values():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, np.float32(0.3))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_of_stacked_and_single_layers_agree(granularity):
    stacked = GRANULARITIES[granularity](SHAPES)
    values = {
        group: np.random.default_rng(seed).normal(size=array.shape).astype(np.float32)
        for seed, (group, array) in enumerate(stacked.init(3, 0.0).items())
    }
    saved = replace(COEFFICIENTS, values=unstack_values(values), granularity=granularity)
    single = saved.scales(UNSTACKED)
    for name, scale in stacked.scales(values).items():
        assert scale.ndim == len(SHAPES[name]) + 1
        if "*" in name:
            for layer in range(2):
                of_layer = single[name.replace("*", str(layer))]
                np.testing.assert_array_equal(of_layer, scale[layer])
        else:
            np.testing.assert_array_equal(single[name], scale)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            BertConfig(num_hidden_layers=2),
            {
                "bert.embeddings.word_embeddings.weight": "bert.embeddings",
                "bert.embeddings.LayerNorm.bias": "bert.embeddings",
                "bert.encoder.layer.1.attention.self.query.weight": "bert.encoder.layer.1",
                "bert.pooler.dense.weight": "bert.pooler",
            },
        ),
        (
            ViTConfig(num_hidden_layers=2),
            {
                "vit.embeddings.cls_token": "vit.embeddings",
                "vit.embeddings.patch_embeddings.projection.weight": "vit.embeddings",
                "vit.layernorm.weight": "vit.layernorm",
            },
        ),
        (
            CLIPConfig(vision_config=dict(num_hidden_layers=2)),
            {
                "vision_model.embeddings.class_embedding": "vision_model.embeddings",
                "vision_model.pre_layrnorm.weight": "vision_model.pre_layrnorm",
                "vision_model.encoder.layers.0.mlp.fc1.bias": "vision_model.encoder.layers.0",
                "vision_model.post_layernorm.bias": "vision_model.post_layernorm",
                "visual_projection.weight": "visual_projection",
            },
        ),
    ],
)
def test_layers_of_models(config, layers):
    network = family_of(config).build_trunk(config)
    names = unstacked_shapes(network)
    found = {name: layer_of(name, names) for name in names}
    assert {name: found[name] for name in layers} == layers
    blocks = {layer for layer in found.values() if layer[-1].isdigit()}
    # Two blocks, and only the modules named above beside them.
    assert {layer.rpartition(".")[2] for layer in blocks} == {"0", "1"}
    assert set(found.values()) == blocks | set(layers.values())
    # The same layers where they are stacked.
    for name in network.shapes:
        layer = layer_of(name, network.shapes)
        assert layer.replace("*", "1") == found[name.replace("*", "1")]


def test_layers_without_numbered_blocks():
    assert layer_of("logit_scale", ["logit_scale", "a.weight"]) == "logit_scale"
    assert layer_of("a.b.weight", ["logit_scale", "a.b.weight"]) == "a"


RANGES = {
    "free": np.array([[-3.0, 0.5, 20.0]]),
    "clip": np.array([[0.0, 0.25, 1.0]]),
    "sigmoid": np.array([[0.001, 0.3, 0.999]]),
    "softmax": np.array([[0.2, 0.7, 0.1]]),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_apply_undoes_invert(name):
    constraint = CONSTRAINTS[name]
    values = RANGES[name].astype(np.float32)
    assert constraint.allows(values[0])
    np.testing.assert_allclose(constraint.apply(constraint.invert(values)), values, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clip", [-0.1, 0.5, 0.5]),
        ("clip", [1.1, 0.5, 0.5]),
        ("sigmoid", [0.0, 0.5, 0.5]),
        ("sigmoid", [0.5, 0.5, 1.0]),
        ("softmax", [0.3, 0.3, 0.3]),
        ("softmax", [1.0, 0.0, 0.0]),
    ],
)
def test_values_out_of_range(name, values):
    assert not CONSTRAINTS[name].allows(np.array(values))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_apply_stays_in_range(name):
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * 4
    for row in np.asarray(CONSTRAINTS[name].apply(raw)):
        assert CONSTRAINTS[name].allows(row)


def test_softmax_is_over_experts():
    values = CONSTRAINTS["softmax"].apply(jnp.zeros((2, 4, 5)))
    np.testing.assert_allclose(values, np.full((2, 4, 5), 0.25))


def test_clip_has_the_gradient_of_torch_clamp():
    raw = np.array([-0.5, 0.0, 0.3, 1.0, 1.5], np.float32)
    values, pull_back = jax.vjp(CONSTRAINTS["clip"].apply, jnp.asarray(raw))
    reference = torch.tensor(raw, requires_grad=True)
    clamped = reference.clamp(0, 1)
    clamped.backward(torch.arange(1.0, 6.0))
    np.testing.assert_array_equal(values, clamped.detach().numpy())
    np.testing.assert_array_equal(pull_back(jnp.arange(1.0, 6.0))[0], reference.grad.numpy())
    assert reference.grad.tolist() == [0, 2, 3, 4, 0]  # passed on at both ends


def test_save_and_load(tmp_path: Path):
    COEFFICIENTS.save(tmp_path / "c.safetensors")
    loaded = Coefficients.load(tmp_path / "c.safetensors")
    assert replace(loaded, values={}) == replace(COEFFICIENTS, values={})
    assert loaded.values.keys() == COEFFICIENTS.values.keys()
    for group, array in COEFFICIENTS.values.items():
        assert loaded.values[group].dtype == np.float32
        np.testing.assert_array_equal(loaded.values[group], array)


def test_the_file_says_what_it_holds(tmp_path: Path):
    COEFFICIENTS.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "np") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("bert.pooler.dense.bias"), [5, 5, 5])
    assert metadata["version"] == version("adamerge_jax")
    assert metadata["format"] == "adamerge_jax coefficients 1"
    fields = {name: json.loads(metadata[name]) for name in metadata.keys() - {"version", "format"}}
    assert fields["granularity"] == "tensor"
    assert fields["constraint"] == "clip"
    assert fields["objective"] == "entropy"
    assert fields["seed"] == 7
    assert fields["step"] == 40
    assert fields["parameters"] == list(UNSTACKED)
    assert fields["base"]["revision"] == "v1"
    assert [expert["identity"] for expert in fields["experts"]] == [
        "sha256:0",
        "sha256:1",
        "sha256:2",
    ]


def test_files_that_are_no_coefficients(tmp_path: Path):
    file = tmp_path / "c.safetensors"
    with pytest.raises(InputError, match=r"c\.safetensors: no such file"):
        Coefficients.load(file)
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Coefficients.load(file)
    save_file({"weight": np.zeros(2)}, file)
    with pytest.raises(InputError, match="not a coefficients file"):
        Coefficients.load(file)
