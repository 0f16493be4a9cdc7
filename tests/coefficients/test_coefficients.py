import json
import pickle
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

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.file import Coefficients, Source, unstack_values
from adamerge_jax.coefficients.granularities import GRANULARITIES, constant, make_granularity
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep

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
    granularity_options={},
    interference=(
        FittedStep("trim", {"density": 0.2}, [0.1, 1 / 3, 0.25]),
        FittedStep("elect_sign", {}),
    ),
    constraint="clip",
    shapes=UNSTACKED,
    base=Source("base", "org/base", "v1", "sha256:0"),
    experts=tuple(Source(f"t{k}", f"experts/t{k}", None, f"sha256:{k}") for k in range(3)),
    objective="entropy",
    seed=7,
    step=40,
)


@pytest.mark.parametrize(
    ("granularity", "options"),
    [
        ("task", {}),
        ("layer", {}),
        ("tensor", {}),
        ("row", {}),
        ("chunk", {"pieces": {"*.layer.1.*": 4}}),
    ],
)
def test_scales_of_stacked_and_single_layers_agree(granularity, options):
    stacked = make_granularity(granularity, options, SHAPES)
    values = {
        group: np.random.default_rng(seed).normal(size=array.shape).astype(np.float32)
        for seed, (group, array) in enumerate(stacked.init(constant(SHAPES, 3, 0.0)).items())
    }
    saved = replace(
        COEFFICIENTS,
        values=unstack_values(values),
        granularity=granularity,
        granularity_options=options,
    )
    single = saved.unstacked_granularity.scales(saved.stacked_once())
    for name, scale in stacked.scales(values).items():
        assert scale.ndim == len(SHAPES[name]) + 1
        if "*" in name:
            for layer in range(2):
                of_layer = single[name.replace("*", str(layer))]
                # Where layers are cut unlike, pieces of the stack share what one piece has here.
                along = (
                    np.broadcast_to(
                        np.repeat(of_layer, scale[layer].size // of_layer.size, 1),
                        scale[layer].shape,
                    )
                    if granularity == "chunk"
                    else of_layer
                )
                np.testing.assert_array_equal(along, scale[layer])
        else:
            np.testing.assert_array_equal(single[name], scale)


RANGES = {
    "free": np.array([[-3.0, 0.5, 20.0]]),
    "clip": np.array([[0.0, 0.25, 1.0]]),
    "sigmoid": np.array([[0.001, 0.3, 0.999]]),
    "softmax": np.array([[0.2, 0.7, 0.1]]),
    "simplex": np.array([[0.0, 0.75, 0.25]]),
    "simplex_with_base": np.array([[0.0, 0.5, 0.25]]),
    "positions": np.array([[0.1, 2.0, 0.25]]),
    "binary": np.array([[-3.0, 0.5, 20.0]]),
    "concrete": np.array([[-3.0, 0.5, 20.0]]),
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
        ("simplex", [0.3, 0.3, 0.3]),
        ("simplex", [1.1, 0.0, -0.1]),
        ("simplex_with_base", [0.5, 0.5, 0.1]),
        ("simplex_with_base", [0.5, 0.1, -0.1]),
        ("positions", [0.5, 0.1, -0.1]),
    ],
)
def test_values_out_of_range(name, values):
    assert not CONSTRAINTS[name].allows(np.array(values))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_apply_stays_in_range(name):
    constraint, generator = CONSTRAINTS[name], np.random.default_rng(0)
    started = constraint.invert(jnp.broadcast_to(RANGES[name], (5, 3)).astype(jnp.float32))
    after_step = jax.tree.map(lambda array: 4 * generator.normal(size=array.shape), started)
    raw = constraint.project(jax.tree.map(lambda array: array.astype(np.float32), after_step))
    for row in np.asarray(constraint.apply(raw)):
        assert constraint.allows(row)


def nearest_on_simplex(values: np.ndarray) -> np.ndarray:
    """The projection by its conditions: the support that leaves a threshold between its values."""
    for size in range(1, len(values) + 1):
        support = np.argsort(-values)[:size]
        theta = (values[support].sum() - 1) / size
        outside = np.delete(values, support)
        if (values[support] > theta).all() and (outside <= theta).all():
            return np.maximum(values - theta, 0)
    raise AssertionError("no support")


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_projections_are_the_nearest_points(experts):
    values = np.random.default_rng(0).normal(scale=0.7, size=(40, experts, 2)).astype(np.float32)
    values[0] = 0.5  # all alike
    for name in ("simplex", "simplex_with_base"):
        found = np.asarray(CONSTRAINTS[name].project(jnp.asarray(values)))
        for group, layer in np.ndindex(40, 2):
            row = values[group, :, layer].astype(np.float64)
            expected = nearest_on_simplex(row)
            if name == "simplex_with_base" and np.maximum(row, 0).sum() <= 1:
                expected = np.maximum(row, 0)
            np.testing.assert_allclose(found[group, :, layer], expected, atol=1e-6)


def test_a_mask_has_the_gradient_of_its_sigmoid():
    """The authors' straight-through estimator, written in PyTorch."""
    generator = np.random.default_rng(0)
    scale = generator.normal(size=(2, 3)).astype(np.float32)
    logits = generator.normal(size=(2, 3, 5)).astype(np.float32)
    cotangent = generator.normal(size=(2, 3, 5)).astype(np.float32)
    raw = {"scale": jnp.asarray(scale), "logits": jnp.asarray(logits)}
    values, pull_back = jax.vjp(CONSTRAINTS["binary"].apply, raw)
    own_scale, own_logits = (torch.tensor(a, requires_grad=True) for a in (scale, logits))
    soft = (own_logits / 10).sigmoid()
    mask = soft + ((soft > 0.5).float() - soft).detach()
    expected = own_scale[..., None] * mask
    expected.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-6, atol=1e-7)
    (gradient,) = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient["scale"], own_scale.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["logits"], own_logits.grad, rtol=1e-5, atol=1e-6)
    off = np.asarray(values) == 0
    np.testing.assert_array_equal(off, logits <= 0)  # exactly 0, and nothing between


def test_a_mask_starts_from_coefficients():
    constraint = CONSTRAINTS["binary"]
    values = jnp.array([[[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.2, 0.4, 0.0]]])  # [G, K, parts]
    raw = constraint.invert(values)
    np.testing.assert_allclose(raw["scale"], [[0.5, 0.0, 0.3]], rtol=1e-6)
    expected = [[[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.3, 0.3, 0.0]]]
    np.testing.assert_allclose(constraint.apply(raw), expected, rtol=1e-6)
    assert (raw["logits"][0, 1] > 0).all()  # an expert that is left out may come back


def test_positions_are_shares_of_base_and_experts_times_a_scale():
    raw = {"position": jnp.log(jnp.array([[0.5, 0.2, 0.3]])), "scale": jnp.array([[2.0]])}
    np.testing.assert_allclose(CONSTRAINTS["positions"].apply(raw), [[0.4, 0.6]], rtol=1e-6)
    started = CONSTRAINTS["positions"].invert(jnp.full((1, 3), 0.3))
    np.testing.assert_allclose(jax.nn.softmax(started["position"]), [[0.25] * 4], rtol=1e-6)
    np.testing.assert_allclose(started["scale"], [[1.2]], rtol=1e-6)


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


@pytest.mark.parametrize("kind", [Path, str])
def test_save_and_load(tmp_path: Path, kind):
    file = kind(tmp_path / "c.safetensors")
    COEFFICIENTS.save(file)
    loaded = Coefficients.load(file)
    assert replace(loaded, values={}) == replace(COEFFICIENTS, values={})
    assert loaded.values.keys() == COEFFICIENTS.values.keys()
    for group, array in COEFFICIENTS.values.items():
        assert loaded.values[group].dtype == np.float32
        np.testing.assert_array_equal(loaded.values[group], array)


def test_granularity_options_are_saved(tmp_path: Path):
    saved = replace(
        COEFFICIENTS,
        values={"bert.pooler.dense.weight": np.ones((3, 4), np.float32)},
        granularity="head",
        granularity_options={"heads": {"*.dense.weight": (1, 4)}},
        shapes={"bert.pooler.dense.weight": (6, 8)},
    )
    saved.save(tmp_path / "c.safetensors")
    loaded = Coefficients.load(tmp_path / "c.safetensors")
    (scale,) = loaded.unstacked_granularity.scales(loaded.stacked_once()).values()
    assert scale.shape == (3, 1, 8)


def test_the_file_says_what_it_holds(tmp_path: Path):
    COEFFICIENTS.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "np") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("bert.pooler.dense.bias"), [5, 5, 5])
    assert metadata["version"] == version("adamerge_jax")
    assert metadata["format"] == "adamerge_jax coefficients 3"
    fields = {name: json.loads(metadata[name]) for name in metadata.keys() - {"version", "format"}}
    assert fields["granularity"] == "tensor"
    assert fields["granularity_options"] == {}
    assert fields["interference"] == [
        {"name": "trim", "options": {"density": 0.2}, "fitted": [0.1, 1 / 3, 0.25]},
        {"name": "elect_sign", "options": {}, "fitted": None},
    ]
    assert fields["constraint"] == "clip"
    assert fields["objective"] == "entropy"
    assert fields["seed"] == 7
    assert fields["step"] == 40
    assert fields["shapes"] == {name: list(shape) for name, shape in UNSTACKED.items()}
    assert fields["started_from"] is None
    assert fields["scaled"] == {}
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
    for metadata in (None, {"format": "adamerge_jax coefficients 1", "version": "0.1"}):
        save_file({"weight": np.zeros(2)}, file, metadata)
        with pytest.raises(InputError, match="not a coefficients file"):
            Coefficients.load(file)


POOLER = "bert.pooler.dense.bias"


def edited(file: Path, group: str, array: np.ndarray | None, **metadata: str | None) -> None:
    """Writes `COEFFICIENTS` with a group and fields of the metadata replaced, or left out."""
    COEFFICIENTS.save(file)
    with safe_open(file, "np") as saved:
        fields = saved.metadata() | metadata
        values = {name: saved.get_tensor(name) for name in saved.keys()} | {group: array}  # noqa: SIM118
    values = {name: array for name, array in values.items() if array is not None}
    save_file(values, file, {name: text for name, text in fields.items() if text is not None})


def refused(file: Path, message: str) -> None:
    """Loading raises an InputError of one line that names the file and says what to do."""
    with pytest.raises(InputError, match=message) as error:
        Coefficients.load(file)
    said = str(error.value)
    assert said.startswith(f"{file}: ")
    assert said.endswith("take it from the run folder again, or learn again")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("group", "array", "message"),
    [
        (POOLER, np.array([0, np.nan, 0], np.float32), f"coefficients of {POOLER} are not finite"),
        (POOLER, np.array([0, -np.inf, 0], np.float32), "are not finite"),
        (POOLER, np.array([0, 1e39, 0]), "are not finite"),
        (POOLER, np.ones(3, np.int32), f"coefficients of {POOLER} are int32, expected float32"),
        (POOLER, np.zeros(2, np.float32), r"have shape \(2,\), expected a row for each of 3"),
        (POOLER, np.zeros(1, np.float32), r"have shape \(1,\), expected a row for each of 3"),
        (POOLER, np.zeros((), np.float32), r"have shape \(\), expected a row for each of 3"),
        (POOLER, np.zeros((3, 2), np.float32), r"have shape \(3, 2\), expected \(3,\) for"),
        (POOLER, None, f"it lacks coefficients of {POOLER}, which the granularity 'tensor' has"),
        ("other", np.zeros(3, np.float32), "it has coefficients of other, not what the gran"),
    ],
)
def test_values_that_are_damaged(tmp_path: Path, group, array, message):
    edited(tmp_path / "c.safetensors", group, array)
    refused(tmp_path / "c.safetensors", message)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("shapes", None, "its metadata lack shapes"),
        ("shapes", "{", "have '{' for shapes, which cannot be read"),
        ("shapes", json.dumps({POOLER: 4}), "for shapes, which cannot be read"),
        ("shapes", "{}", "it is of 3 experts and 0 merged tensors"),
        ("experts", "[]", "it is of 0 experts"),
        ("experts", json.dumps([{"name": "a"}]), "for experts, which cannot be read"),
        ("base", "null", "have 'null' for base"),
        ("interference", json.dumps(["trim"]), "for interference, which cannot be read"),
        ("seed", "x" * 200, "have 'x{59} for seed"),
        ("granularity", '"atom"', "found 'atom'; expected one of task"),
        ("granularity", '"row"', r"expected \(3, 4\) for the granularity 'row'"),
        ("granularity_options", '{"pieces": 3}', "tensor says: .*'pieces'"),
        ("granularity_options", "[" * 100_000, "for granularity_options, which cannot be read"),
        ("granularity_options", '{"a": ' * 100_000, "for granularity_options, which cannot be"),
        ("granularity_options", '{"a": NaN}', "for granularity_options, which cannot be read"),
        ("granularity_options", '{"a": 1e999}', "for granularity_options, which cannot be read"),
        ("seed", "9" * 5000, "for seed, which cannot be read"),
        ("seed", '"7"', "for seed, which cannot be read"),
        ("seed", "-1", "it has -1 for seed, expected at least 0"),
        ("step", "true", "for step, which cannot be read"),
        ("constraint", '"os:system"', "there is no constraint 'os:system'"),
        ("scaled", '{"t0": Infinity}', "for scaled, which cannot be read"),
        ("scaled", '{"other": 1}', "it scales 'other', which is no expert of it"),
        ("depths", '{"a.*": 1000000000}', r"'a\.\*' has 1000000000 layers"),
        ("shapes", '{"a.*.b": [1000000000]}', r"'a\.\*\.b' is no name of a merged tensor"),
        ("shapes", '{"a": [4294967296, 4294967296]}', "a has the shape"),
        ("shapes", '{"a": [-1]}', "a has the shape"),
        ("shapes", json.dumps({"a": [1] * 40}), "a has the shape"),
        ("experts", json.dumps([vars(COEFFICIENTS.experts[0])] * 3), "a name of its own for each"),
        ("interference", json.dumps([{"name": "x", "options": {}}]), "found 'x'; expected one of"),
        (
            "interference",
            json.dumps([{"name": "trim", "options": {"density": 7}, "fitted": [0.1] * 3}]),
            "density is 7, expected over 0 and up to 1",
        ),
        (
            "interference",
            json.dumps([{"name": "elect_sign", "options": {}, "fitted": [1]}]),
            "elect_sign has no facts of 3 task vectors",
        ),
    ],
)
def test_metadata_that_are_damaged(tmp_path: Path, field, text, message):
    edited(tmp_path / "c.safetensors", POOLER, np.zeros(3, np.float32), **{field: text})
    refused(tmp_path / "c.safetensors", message)


def test_metadata_of_other_tools_are_ignored(tmp_path: Path):
    own = {"description": "not JSON", "values": "[]", "version": None}
    edited(tmp_path / "c.safetensors", POOLER, COEFFICIENTS.values[POOLER], **own)
    loaded = Coefficients.load(tmp_path / "c.safetensors")
    assert replace(loaded, values={}) == replace(COEFFICIENTS, values={})


def test_what_earlier_files_do_not_say(tmp_path: Path):
    saved = replace(COEFFICIENTS, depths={"bert.encoder.layer.*": 2})
    saved.save(tmp_path / "c.safetensors")
    assert Coefficients.load(tmp_path / "c.safetensors").depths == saved.depths
    edited(tmp_path / "c.safetensors", POOLER, COEFFICIENTS.values[POOLER], depths=None)
    assert Coefficients.load(tmp_path / "c.safetensors").depths == {}


def test_what_needs_no_module_reads_ones_own_granularity(tmp_path: Path):
    own = replace(COEFFICIENTS, granularity="no_such_module:f")
    own.save(tmp_path / "c.safetensors")
    assert Coefficients.load(tmp_path / "c.safetensors").granularity == "no_such_module:f"


def test_layers_that_are_cut_unlike_are_loaded(tmp_path: Path):
    options = {"pieces": {"*.layer.1.*": 4}}
    values = make_granularity("chunk", options, SHAPES).init(constant(SHAPES, 3, 0.5))
    saved = replace(
        COEFFICIENTS,
        values=unstack_values(values),
        granularity="chunk",
        granularity_options=options,
    )
    saved.save(tmp_path / "c.safetensors")
    loaded = Coefficients.load(tmp_path / "c.safetensors")
    assert loaded.values["bert.encoder.layer.0.output.dense.weight"].shape == (3, 1)


@pytest.mark.parametrize("factor", [1e39, -1e39, 3e38, 1e33])
def test_factors_that_are_too_large(factor):
    COEFFICIENTS.times({"t1": 1e15})
    with pytest.raises(InputError, match=r"'t1' times -?[13]e\+3[389] are not finite in float32"):
        COEFFICIENTS.times({"t1": factor})


def test_the_granularity_is_made_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    registered = GRANULARITIES["tensor"]
    monkeypatch.setitem(
        GRANULARITIES, "tensor", lambda shapes: calls.append(shapes) or registered(shapes)
    )
    fresh = replace(COEFFICIENTS)
    fresh.scales(), fresh.scales(), fresh.per_tensor()
    assert calls == [fresh.shapes]
    assert fresh.unstacked_granularity is fresh.unstacked_granularity
    assert replace(fresh, step=1) != fresh and replace(fresh) == COEFFICIENTS


def test_coefficients_are_pickled(tmp_path: Path):
    COEFFICIENTS.save(tmp_path / "coefficients.safetensors")
    loaded = Coefficients.load(tmp_path / "coefficients.safetensors")
    copied = pickle.loads(pickle.dumps(loaded))
    assert copied.granularity == loaded.granularity and copied.shapes == loaded.shapes
    assert all((copied.values[group] == loaded.values[group]).all() for group in loaded.values)


def test_the_granularity_for_other_shapes_is_made_for_one_release():
    with pytest.warns(DeprecationWarning, match="unstacked_granularity"):
        made = COEFFICIENTS.make_granularity(COEFFICIENTS.shapes)
    assert made.units == COEFFICIENTS.unstacked_granularity.units


def test_a_folder_without_coefficients_is_told(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without coefficients\.safetensors; give a"):
        Coefficients.load(tmp_path)
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "01.safetensors").touch()
    with pytest.raises(InputError, match=r", such as .*/front/01\.safetensors, or a run folder"):
        Coefficients.load(tmp_path)
