"""What two coefficients files have in common and what not."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients, Source
from adamerge_jax.errors import InputError
from adamerge_jax.report.comparison import compare
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.results import Results, write_results
from adamerge_jax.runs.rows import Row

SHAPES = {
    "embeddings.weight": (7, 2),
    "layer.0.dense.weight": (4, 2),
    "layer.1.dense.weight": (4, 2),
    "layer.1.dense.bias": (4,),
}


def source(name: str, version: str = "1") -> Source:
    return Source(name, f"experts/{name}", None, f"sha256:{version * 64}")


def coefficients(granularity: str, values: dict[str, np.ndarray], names="ab") -> Coefficients:
    return Coefficients(
        values=values,
        granularity=granularity,
        granularity_options={},
        interference=(),
        constraint="free",
        shapes=SHAPES,
        base=source("base"),
        experts=tuple(source(name) for name in names),
        objective="entropy",
        seed=0,
        step=3,
    )


def by_row(names="ab", seed: int = 0) -> Coefficients:
    generator = np.random.default_rng(seed)
    experts = len(names)
    shapes = {
        name: (experts, shape[0]) if len(shape) == 2 and "dense" in name else (experts,)
        for name, shape in SHAPES.items()
    }
    values = {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return coefficients("row", values, names)


def test_one_granularity_is_compared_one_by_one():
    first = by_row("abc")
    values = {name: array[[1, 0]].copy() for name, array in first.values.items()}
    values["layer.1.dense.weight"][0, 2] -= 2.5  # of b
    second = replace(coefficients("row", values, "ba"), objective="logits", scaled={"a": 0.5})
    found = compare(first, second)
    assert not found.per_tensor
    assert found.compared == 4
    assert [own.name for own in found.experts] == ["a", "b"]
    a, b = found.experts
    assert a.change == a.largest == 0
    assert a.correlation == pytest.approx(1)
    assert (b.largest, b.where) == (pytest.approx(-2.5), "layer.1.dense.weight")
    # One of 4 rows of a matrix of 8 parameters, among 34 parameters.
    assert b.change == pytest.approx(2.5 * 2 / 34, rel=1e-5)
    assert b.second - b.first == pytest.approx(-2.5 * 2 / 34, rel=1e-4)
    parameters = np.concatenate(
        [
            np.broadcast_to(
                array[1].reshape(-1, *(1 for _ in SHAPES[name][1:]))
                if array.ndim == 2
                else array[1],
                SHAPES[name],
            ).ravel()
            for name, array in first.values.items()
        ]
    )
    assert b.first == pytest.approx(parameters.mean(), rel=1e-5)
    layer, change = found.layers[0]
    assert layer == "layer.1"
    np.testing.assert_allclose(change, [0, 2.5 * 2 / 12], rtol=1e-5)
    np.testing.assert_allclose(found.differences["layer.1.dense.weight"], [0, -2.5 / 4], rtol=1e-5)
    differing = {name: (a, b) for name, a, b in found.fields}
    assert differing == {
        "c": ("experts/c (sha256:111111111111)", "not in it"),
        "objective": ("entropy", "logits"),
        "scaled": ("none", "{'a': 0.5}"),
    }


def test_other_granularities_are_compared_by_tensor():
    first = by_row()
    tensors = {name: np.arange(2.0, dtype=np.float32) for name in SHAPES}
    found = compare(first, coefficients("tensor", tensors))
    assert found.per_tensor
    assert found.by_tensor
    for name, array in first.values.items():
        expected = np.arange(2.0) - array.reshape(2, -1).mean(1)
        np.testing.assert_allclose(found.differences[name], expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(found.experts[0].correlation)
    assert ("granularity", "row", "tensor") in found.fields


def test_correlation_is_pearsons():
    first, second = by_row(seed=0), by_row(seed=1)
    weight = [SHAPES[name] for name in SHAPES]
    x, y = (
        np.concatenate(
            [
                np.repeat(own.values[name][0], np.prod(shape) // own.values[name][0].size)
                for name, shape in zip(SHAPES, weight, strict=True)
            ]
        )
        for own in (first, second)
    )
    expected = np.corrcoef(x, y)[0, 1]
    assert compare(first, second).experts[0].correlation == pytest.approx(expected, rel=1e-5)


def test_nothing_in_common():
    with pytest.raises(InputError, match="no expert in common: a, b and c, d"):
        compare(by_row("ab"), by_row("cd"))
    other = replace(by_row(), values={"x": np.ones(2, np.float32)}, shapes={"x": (3,)})
    with pytest.raises(InputError, match="nothing in common"):
        compare(by_row(), other)


@pytest.mark.parametrize("granularity", ["row", "task"])
def test_the_command_prints_and_draws(granularity, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    made = {"row": by_row, "task": lambda seed: coefficients("task", {"all": np.full(2, seed / 4)})}
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    newer = (source("a", "2"), source("b"))
    made[granularity](seed=1).save(files[0])
    replace(made[granularity](seed=2), experts=newer).save(files[1])
    cli.main(["compare", *map(str, files), "--out", str(tmp_path / "map.png")])
    printed = capsys.readouterr().out
    assert "experts/a (sha256:222222222222)" in printed
    assert "Layers that changed most" in printed
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_where_no_picture_can_go(tmp_path, capsys):
    by_row().save(tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["compare", *[str(tmp_path / "a.safetensors")] * 2, "--out", "map.jpg"])
    assert "expected a .png file" in capsys.readouterr().err


def test_results_beside_the_files(tmp_path, capsys):
    """Of runs, what the results say of each is compared too; a file alone has none."""
    files = []
    for name, merged in (("one", 0.7), ("two", 0.8), ("three", None)):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "coefficients.safetensors")
        by_row().save(files[-1])
        if merged is not None:
            rows = [
                Row("base", {"a": 0.5}),
                Row("experts (one model each)", {"a": 1.0}, kind="experts"),
                Row("learned (row)", {"a": merged}, kind="learned"),
            ]
            write_results(Results(rows, measure_outcome(rows)), tmp_path / name / "results.json")
    cli.main(["compare", str(files[0]), str(files[1])])
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if "The merge reaches" in line)
    assert first.startswith("first: The merge reaches 70.0% on average: 70.0% of the experts'")
    assert "closes 60% of the gap from base" in second
    cli.main(["compare", str(files[0]), str(files[2])])
    assert capsys.readouterr().out.count("The merge reaches") == 1
    (tmp_path / "three" / "results.json").write_text("[]")
    with pytest.raises(SystemExit):
        cli.main(["compare", str(files[0]), str(files[2])])
    assert "results.json" in capsys.readouterr().err


def test_names_are_shown_as_they_are(tmp_path, capsys):
    hostile = "\x1b[2Ja[red]"
    first = by_row()
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    renamed = tuple(replace(expert, name=f"{hostile}{expert.name}") for expert in first.experts)
    replace(first, experts=renamed).save(files[0])
    replace(first, experts=renamed, objective=hostile).save(files[1])
    cli.main(["compare", *map(str, files)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[2Ja[red]" in printed
