"""Merges by a method: learning starts from them, and a coefficients file repeats them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from adamerge_jax import extension
from adamerge_jax.cli.main import main
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.initial_merge import InitialMerge
from adamerge_jax.errors import InputError
from adamerge_jax.methods import METHODS, MergeMethod
from adamerge_jax.methods.by_tensor import by_tensor
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.pipeline.export import export_mergekit
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.initial_merge import (
    coefficients_of_method,
    fit_initial_merge,
    merged_names,
    only_mixed,
    stored_tensors,
)
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.warm_start import WarmStart, open_warm_start
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.search.candidates import Candidates
from tests.adapter_references import save_experts
from tests.references import learning_inputs

LEARNING = {"steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 0.05}}
MEDIAN = "tests.pipeline.test_initial_merge:median"
FILE = "coefficients.safetensors"
FOR_ADAPTERS = {"lora_lego"}


@extension
def median() -> MergeMethod:
    """A method of somebody's own that sees one tensor after the other."""
    return by_tensor(lambda tensor: jnp.median(tensor.deltas, axis=0))


def written(fields: dict[str, Any], folder: Path, **changes: Any) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields | {"export": {"orbax": False}} | changes))
    return recipe


def refusal(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in command])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def require_same_files(first: Path, second: Path) -> None:
    """Every file of two exported checkpoints has the same bytes."""
    names, others = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (first, second)
    )
    assert names == others
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.fixture(scope="module")
def models(text_fields) -> Models:
    return open_models(parse_recipe(text_fields), Path("/"))


@pytest.fixture(scope="module")
def models_of_method(image_fields, tmp_path_factory) -> Callable[[str], Models]:
    """The models that a method merges: whole ones, or adapters where it takes no others."""
    whole = open_models(parse_recipe(image_fields), Path("/"))
    fields, _ = save_experts("vit", tmp_path_factory.mktemp("adapters"))
    adapters = open_models(parse_recipe(fields), Path("/"))
    return lambda name: adapters if name in FOR_ADAPTERS else whole


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name]().needs_data])
def test_the_file_of_every_method_repeats_its_merge(name, models_of_method, tmp_path):
    models = models_of_method(name)
    coefficients = coefficients_of_method(models, fit_initial_merge(models, name, {}))
    coefficients.save(tmp_path / FILE)
    assert coefficients.of_method_alone == name
    merged = dict(fold(models, coefficients))
    loaded, matched, _ = prepare_fold(tmp_path / FILE, models)
    changed = 0
    for tensor, values in fold(matched, loaded):
        assert values.tobytes() == merged[tensor].tobytes()
        changed += np.any(values != models.base.read(tensor))
    assert changed > 5


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().needs_data])
def test_the_file_of_a_method_from_data_repeats_its_merge(name, image_recipe, tmp_path):
    recipe, folder = written(image_recipe, tmp_path), tmp_path / "merged"
    main(["merge", str(recipe), "--method", name, "--out", str(folder)])
    main(["fold", str(recipe), str(folder / FILE), "--out", str(tmp_path / "fold")])
    require_same_files(folder / "checkpoint", tmp_path / "fold" / "checkpoint")
    stored = Coefficients.load(folder / FILE)
    assert stored.of_method_alone == name and len(stored.initial_tensors) > 10


@pytest.fixture(scope="module", params=["average", "task_arithmetic", "ties", MEDIAN])
def merged(request, image_fields, tmp_path_factory) -> tuple[str, Path, Path]:
    """A method, a recipe that learns from it, and the folder of its merge."""
    folder = tmp_path_factory.mktemp("merged")
    chosen = {"constraint": "free", "initial_merge": {"name": request.param}}
    recipe = written(image_fields, folder, coefficients=chosen, learning=LEARNING)
    out = folder / "merged"
    main(["merge", str(recipe), "--method", request.param, "--out", str(out), "--allow-code"])
    return request.param, recipe, out


def test_the_command_repeats_a_merge(merged, tmp_path):
    _, recipe, folder = merged
    main(["fold", str(recipe), str(folder / FILE), "--out", str(tmp_path / "fold"), "--allow-code"])
    require_same_files(folder / "checkpoint", tmp_path / "fold" / "checkpoint")


def test_learning_starts_from_a_merge(merged, tmp_path):
    """What is learned from a merge is folded to the bytes of the run's export."""
    method, recipe, _ = merged
    run = tmp_path / "run"
    main(["learn", str(recipe), "--out", str(run), "--allow-code"])
    main(["fold", str(recipe), str(run / FILE), "--out", str(tmp_path / "fold"), "--allow-code"])
    folders = run, tmp_path / "fold"
    weights, again = (load_file(f / "checkpoint" / "model.safetensors") for f in folders)
    assert all(weights[name].tobytes() == again[name].tobytes() for name in weights)
    rows = {row["method"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert {method, "learned (tensor)"} <= rows.keys()
    learned = Coefficients.load(run / FILE)
    assert learned.initial_merge.name == method and learned.initial == 0
    assert any(values.any() for values in learned.values.values())
    assert method in (run / "checkpoint" / "README.md").read_text()
    assert f"added to the merge by {method}, in place of" in (run / "report.html").read_text()


def test_zero_after_task_arithmetic_is_its_coefficient_after_the_base(image_recipe, tmp_path):
    for task in image_recipe["tasks"].values():
        del task["test"]
    losses, starts = [], []
    task_arithmetic = {"name": "task_arithmetic", "options": {"coefficient": 0.3}}
    for number, chosen in enumerate([{"initial": 0.3}, {"initial_merge": task_arithmetic}]):
        chosen |= {"constraint": "free"}
        recipe = written(image_recipe, tmp_path, coefficients=chosen, learning=LEARNING)
        run = tmp_path / str(number)
        main(["learn", str(recipe), "--out", str(run)])
        first, second, *_ = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([*first["held_out"].values(), *second["objective"].values()])
        starts.append(Coefficients.load(run / FILE).initial)
    assert starts == [0.3, 0.0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def stored(models, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """The file of a merge that depends on data, and its tensors."""
    generator = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(generator.normal(size=shape), jnp.float32)
        for name, shape in models.shapes.items()
    }
    tensors = stored_tensors(models, parameters, merged_names(models))
    file = tmp_path_factory.mktemp("stored") / FILE
    initial = InitialMerge("from_data", {"rank": 2}, stored=True)
    coefficients_of_method(models, initial, tensors).save(file)
    return file, tensors


def test_a_merge_that_depends_on_data_is_stored(stored, models):
    """Fold needs its tensors alone, and neither its method nor data."""
    file, tensors = stored
    coefficients, matched, _ = prepare_fold(file, models)
    merged = dict(fold(matched, coefficients))
    assert {name: merged[name].tobytes() for name in tensors} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    assert coefficients.of_method_alone == "from_data (rank 2)"


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_tensors_that_are_not_mixed_stay_the_base(models):
    """A method from data may change what no expert changed, and what is kept from the base."""
    base, merged = (
        {name: jnp.full(shape, value, jnp.float32) for name, shape in models.shapes.items()}
        for value in (1.0, 2.0)
    )
    mixed = [name for name in models.base.names if name != QUERY and "embeddings" not in name]
    parameters = only_mixed(models, merged, base, mixed)
    assert parameters.keys() == base.keys()
    for name in models.shapes:
        tensors = models.tensors(name)
        rows = parameters[name] if is_stacked(name) else parameters[name][None]
        for tensor, row in zip(tensors, rows, strict=True):
            assert (row == (2.0 if tensor in mixed else 1.0)).all(), tensor


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks the tensor {QUERY} of its merge"),
        (lambda tensors: tensors.update(other=np.zeros(1)), "has the tensor other of its merge"),
        (lambda tensors: tensors.update({QUERY: np.zeros((2, 2))}), r"is float32 of shape \(2, 2"),
        (lambda tensors: tensors[QUERY].__setitem__((0, 0), np.nan), f"{QUERY}.*is not finite"),
    ],
    ids=["lost", "invented", "shape", "nan"],
)
def test_stored_tensors_are_checked(damage, message, stored, tmp_path):
    loaded = Coefficients.load(stored[0])
    tensors = {name: tensor.copy() for name, tensor in loaded.initial_tensors.items()}
    damage(tensors)
    dataclasses.replace(loaded, initial_tensors=tensors).save(tmp_path / FILE)
    with pytest.raises(InputError, match=message):
        Coefficients.load(tmp_path / FILE)


def test_tensors_of_a_merge_that_needs_none_are_refused(stored, tmp_path):
    loaded = Coefficients.load(stored[0])
    initial = dataclasses.replace(loaded.initial_merge, stored=False)
    dataclasses.replace(loaded, initial_merge=initial).save(tmp_path / FILE)
    with pytest.raises(InputError, match=r"has the tensor .* of its merge"):
        Coefficients.load(tmp_path / FILE)


TIES = {"name": "ties", "options": {"density": 0.5}}


@pytest.fixture(scope="module")
def of_ties(models, tmp_path_factory) -> Path:
    """The file of a merge by ties."""
    file = tmp_path_factory.mktemp("ties") / FILE
    coefficients_of_method(models, fit_initial_merge(models, **TIES)).save(file)
    return file


def models_of(fields: dict[str, Any], tasks: Sequence[str]) -> Models:
    chosen = {task: fields["tasks"][task] for task in tasks}
    return open_models(parse_recipe(fields | {"tasks": chosen}), Path("/"))


def test_experts_may_come_in_any_order_and_none_may_be_missing(of_ties, models, text_fields):
    tasks = list(text_fields["tasks"])
    coefficients, matched, _ = prepare_fold(of_ties, models_of(text_fields, tasks[::-1]))
    merged = dict(fold(models, Coefficients.load(of_ties)))
    assert all((merged[name] == values).all() for name, values in fold(matched, coefficients))
    with pytest.raises(InputError, match=r"the merge by ties \(density 0.5\) needs it: add it"):
        prepare_fold(of_ties, models_of(text_fields, tasks[1:]))


def test_what_a_merge_of_all_experts_cannot_be(of_ties, models, tmp_path):
    with pytest.raises(InputError, match=r"^scale: .* merge of all experts by ties"):
        prepare_fold(of_ties, models, scale={next(iter(models.experts)): 0.5})
    with pytest.raises(InputError, match="mergekit cannot make this merge: it is a merge by ties"):
        export_mergekit(models, Coefficients.load(of_ties), tmp_path / "m.yaml", None)


def test_its_coefficients_are_for_no_other_start(of_ties, models, text_fields):
    """A file starts learning only if both add task vectors to the same merge."""

    def start_of(coefficients: dict[str, Any], start: Path) -> WarmStart | None:
        fields = {"constraint": "free", "start": str(start)} | coefficients
        recipe = parse_recipe(text_fields | {"coefficients": fields})
        return open_warm_start(build(recipe, models), models, Path("/"))

    start = start_of({"initial_merge": TIES}, of_ties)
    assert all((scale == 0).all() for scale in start.scales.values())
    for other, words in [
        ({}, "the recipe adds them to the base; set coefficients.initial_merge to ties"),
        ({"initial_merge": {"name": "ties"}}, "the recipe adds them to ties; set"),
    ]:
        with pytest.raises(InputError, match=words):
            start_of(other, of_ties)
    plain = of_ties.parent / "plain.safetensors"
    dataclasses.replace(Coefficients.load(of_ties), initial_merge=None).save(plain)
    with pytest.raises(InputError, match="added to the base, the recipe adds them to ties"):
        start_of({"initial_merge": TIES}, plain)
    with pytest.raises(InputError, match="takes its place; leave one of the two out"):
        start_of({"initial_merge": TIES}, Path("merge.yaml"))


def test_an_adapter_is_refused_before_anything_is_learned(image_recipe, tmp_path, capsys):
    chosen = {"constraint": "free", "initial_merge": {"name": "average"}}
    recipe = written(image_recipe, tmp_path, coefficients=chosen, export={"adapter": True})
    error = refusal(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert "export.adapter: " in error and "gives no factors" in error
    assert not (tmp_path / "run").exists()


def test_coefficients_start_at_zero_whatever_the_preset(text_fields):
    def coefficients(**fields: Any) -> Recipe:
        chosen = {"initial_merge": {"name": "average"}} | fields
        return parse_recipe(text_fields | {"preset": "adamerging", "coefficients": chosen})

    assert coefficients().initial_coefficient == 0
    assert coefficients(initial=0.1).initial_coefficient == 0.1
    assert coefficients(initial_merge=None).initial_coefficient == 0.3
    for constraint in ("sigmoid", "softmax", "simplex"):
        with pytest.raises(InputError, match=r"initial: 0 \(the default with initial_merge\)"):
            coefficients(constraint=constraint)
    with pytest.raises(InputError, match="nearest is 'ties'"):
        coefficients(initial_merge={"name": "tise"})
    with pytest.raises(InputError, match=r"coefficients.initial_merge.name: .* --allow-code"):
        coefficients(initial_merge={"name": "os:system"})


def test_the_file_is_shown_in_words(of_ties, stored, models, capsys):
    main(["inspect", str(of_ties)])
    words = capsys.readouterr().out
    assert "merge by       ties (density 0.5)\n" in words
    assert "its steps      trim (density 0.5), elect_sign, disjoint_mean\n" in words
    assert "nothing: the merge is that of the method alone" in words
    assert "Mean coefficient" not in words
    main(["inspect", str(stored[0])])
    assert "its tensors    stored in the file\n" in capsys.readouterr().out
    main(["compare", str(of_ties), str(stored[0])])
    words = " ".join(capsys.readouterr().out.split())
    assert "added to │ merge by ties (density 0.5) │ merge by from_data (rank 2)" in words


def test_a_search_scores_what_is_added_to_the_merge(image_recipe):
    chosen = {"constraint": "free", "initial_merge": TIES}
    inputs = learning_inputs(parse_recipe(image_recipe | {"coefficients": chosen}), Path("/"))
    candidates = Candidates(inputs, 2)
    for value in (0.0, 0.2):
        point = candidates.all_at(value)
        scored = candidates.parameters(point)
        folded = dict(fold(inputs.workspace.models, candidates.coefficients(point, 1)))
        for name in inputs.deltas:
            tensors = [folded[tensor] for tensor in inputs.workspace.models.tensors(name)]
            expected = np.stack(tensors) if is_stacked(name) else tensors[0]
            np.testing.assert_allclose(scored[name], expected, rtol=0, atol=1e-6)
