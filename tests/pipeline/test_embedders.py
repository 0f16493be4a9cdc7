"""Sentence embedders from a recipe to a checkpoint that sentence-transformers opens."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    GPTNeoXForCausalLM,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetModel,
    PreTrainedModel,
    RoFormerForMaskedLM,
)

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.sentence_modules import read_embedding_form, write_embedding_form
from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.pipeline.ended_run import Run
from adamerge_jax.pipeline.merge import open_statistics
from adamerge_jax.pipeline.models import match_backbone, open_models
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from tests.language_references import language_expert, rows_of
from tests.references import (
    SPECIAL_TOKENS,
    bert_tokenizer,
    randomise,
    require_sum,
    sentences,
    write_json_lines,
)

TASKS = ("colours", "animals")
FEATURES = 16
FORM = EmbeddingForm("mean", True, prompts={"query": "a "})


class Embedders(NamedTuple):
    root: Path
    fields: dict[str, Any]


SIZES = {
    "hidden_size": FEATURES,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}


def _save_embedders(root: Path, make_base: Callable[[int], PreTrainedModel]) -> Embedders:
    """A base and two experts, as sentence-transformers saves them, and pairs with scores."""
    tokenizer = bert_tokenizer(root)
    base = randomise(make_base(len(tokenizer)))
    models = {task: language_expert(base, seed) for seed, task in enumerate(TASKS, start=1)}
    for name, model in {"base": base, **models}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        write_embedding_form(root / name, FORM, FEATURES)
    tasks = {}
    for seed, task in enumerate(TASKS):
        scores = np.random.default_rng(seed).integers(4, size=24)
        texts = zip(sentences(24, seed), sentences(24, seed + len(TASKS)), scores, strict=True)
        rows = [{"first": a, "second": b, "score": int(score)} for a, b, score in texts]
        write_json_lines(root / f"{task}.jsonl", rows)
        pairs = {"path": f"{task}.jsonl", "text": ["first", "second"]}
        tasks[task] = {
            "expert": task,
            "calibration": {"path": f"{task}.jsonl", "text": "first"},
            "test": pairs | {"label": "score"},
        }
    learning = {"steps": 2, "batch_size": 8, "copies": 1}
    return Embedders(root, {"base": "base", "tasks": tasks, "learning": learning})


@pytest.fixture(scope="module")
def embedders(tmp_path_factory: pytest.TempPathFactory) -> Embedders:
    root = tmp_path_factory.mktemp("embedders")
    return _save_embedders(root, lambda tokens: BertModel(BertConfig(vocab_size=tokens, **SIZES)))


def _run(embedders: Embedders, out: Path, console: Console) -> Run:
    return learn(parse_recipe(embedders.fields), root=embedders.root, out=out, console=console)


@pytest.fixture(scope="module")
def merged(embedders: Embedders, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(embedders, tmp_path_factory.mktemp("merged") / "run", Console(quiet=True))


@pytest.fixture(scope="module")
def workspace(embedders: Embedders) -> Workspace:
    return open_workspace(parse_recipe(embedders.fields), embedders.root)


def _require_embeddings_of_sentence_transformers(
    embedders: Embedders, merged: Run, workspace: Workspace
) -> None:
    folder = merged.folder / "checkpoint"
    reference = SentenceTransformer(str(folder), device="cpu")
    matched = match_backbone(workspace.models, Checkpoint.open(folder), "merge")
    parameters = load_backbone(workspace.models, matched, None)
    for task in TASKS:
        pairs = rows_of(embedders.root / f"{task}.jsonl")
        ours = workspace.evaluator.logits(parameters, task, workspace.data.test[task])
        assert ours.shape == (len(pairs), 2, FEATURES)
        sides = [reference.encode([pair[side] for pair in pairs]) for side in ("first", "second")]
        for position, theirs in enumerate(sides):
            # Two implementations in float32 of vectors of length 1.
            np.testing.assert_allclose(ours[:, position], theirs, atol=1e-5)
        similarities = (sides[0] * sides[1]).sum(-1)
        expected = spearmanr(similarities, [pair["score"] for pair in pairs])[0]
        assert merged.rows[-1].tasks[task] == pytest.approx(expected, abs=1e-3)
    assert read_embedding_form(folder, FEATURES) == FORM


def test_export_opens_in_sentence_transformers(
    embedders: Embedders, merged: Run, workspace: Workspace
) -> None:
    _require_embeddings_of_sentence_transformers(embedders, merged, workspace)
    folder = merged.folder / "checkpoint"
    names = Checkpoint.open(folder).tensors
    assert "encoder.layer.1.output.dense.weight" in names  # no prefix that a head would need
    assert "pooler.dense.weight" in names  # carried: no embedding depends on it


def test_an_mpnet_learns_from_packed_texts(tmp_path: Path) -> None:
    def make_base(tokens: int) -> PreTrainedModel:
        return MPNetModel(MPNetConfig(vocab_size=tokens, pad_token_id=0, **SIZES))

    embedders = _save_embedders(tmp_path, make_base)
    console = Console(file=io.StringIO(), width=200)
    run = _run(embedders, tmp_path / "run", console)
    assert "several texts in a row" in console.file.getvalue()
    workspace = open_workspace(parse_recipe(embedders.fields), tmp_path)
    assert not workspace.models.family.bridged
    _require_embeddings_of_sentence_transformers(embedders, run, workspace)
    names = Checkpoint.open(run.folder / "checkpoint").tensors
    assert {"encoder.relative_attention_bias.weight", "pooler.dense.weight"} <= names.keys()


def test_table_and_evaluation(embedders: Embedders, merged: Run, workspace: Workspace) -> None:
    assert {row.metric for row in merged.rows} == {"spearman"}
    row = evaluate(
        parse_recipe(embedders.fields),
        str(merged.folder / "checkpoint"),
        root=embedders.root,
        console=Console(quiet=True),
    )
    assert row.tasks == pytest.approx(merged.rows[-1].tasks, abs=1e-3)
    card = (merged.folder / "checkpoint" / "README.md").read_text()
    assert "sentence-transformers" in card and "SentenceTransformer(" in card


def test_fold_writes_the_same_and_a_merge_is_that_of_its_formula(
    embedders: Embedders, merged: Run, tmp_path: Path
) -> None:
    console, root = Console(quiet=True), embedders.root
    recipe = parse_recipe(embedders.fields)
    fold_file(
        merged.folder / "coefficients.safetensors",
        recipe,
        root=root,
        out=tmp_path / "fold",
        console=console,
    )
    merge(recipe, "task_arithmetic", {}, root=root, out=tmp_path / "merge", console=console)
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "fold" / weights).read_bytes() == (merged.folder / weights).read_bytes()
    base, *experts = (load_file(root / name / "model.safetensors") for name in ("base", *TASKS))
    result = load_file(tmp_path / "merge" / weights)
    assert result.keys() == base.keys()
    for name, values in base.items():
        scale = 0.0 if name.startswith("pooler.") else 0.3
        tensors = [expert[name] for expert in experts]
        require_sum(result[name], values, tensors, scale, rtol=1e-7, atol=1e-6, name=name)
    assert read_embedding_form(tmp_path / "merge" / "checkpoint", FEATURES) == FORM


HEADED = {
    # The output layer has another name than most.
    "GPTNeoX": (GPTNeoXForCausalLM, {"hidden_size": FEATURES, "intermediate_size": 24}),
    "MPNet": (MPNetForMaskedLM, {"hidden_size": FEATURES, "intermediate_size": 24}),
    "Electra": (ElectraForMaskedLM, {"hidden_size": FEATURES, "intermediate_size": 24}),
    # By its PyTorch forward; the head is several tensors.
    "RoFormer": (RoFormerForMaskedLM, {"hidden_size": FEATURES, "intermediate_size": 24}),
    "DistilBert": (DistilBertForMaskedLM, {"dim": FEATURES, "hidden_dim": 24}),
    "ModernBert": (
        ModernBertForMaskedLM,
        dict.fromkeys(SPECIAL_TOKENS, 0) | {"hidden_size": FEATURES, "intermediate_size": 24},
    ),
}


@pytest.mark.parametrize("kind", HEADED)
def test_no_head_of_the_base_is_carried(kind: str, embedders: Embedders, tmp_path: Path) -> None:
    model_class, sizes = HEADED[kind]
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_class(model_class.config_class(vocab_size=45, **sizes, **layers))
    body = model.base_model
    for name in ("base", *TASKS):
        # An expert of a family here may have been saved with its head, too.
        is_whole = name == "base" or (kind != "RoFormer" and name == TASKS[0])
        (model if is_whole else body).save_pretrained(tmp_path / name)
        for file in (embedders.root / name).glob("*token*"):
            shutil.copy(file, tmp_path / name)
        write_embedding_form(tmp_path / name, FORM, FEATURES)
    tasks = {task: {"expert": task, "calibration": "none"} for task in TASKS}
    recipe = parse_recipe({"base": "base", "tasks": tasks})
    opened = open_models(recipe, tmp_path)
    assert opened.family.bridged == (kind == "RoFormer")
    for name in opened.base.names:
        np.testing.assert_array_equal(opened.base.read(name), opened.experts[TASKS[1]].read(name))
    out = tmp_path / "out"
    merge(recipe, "task_arithmetic", {}, root=tmp_path, out=out, console=Console(quiet=True))
    result = load_file(out / "checkpoint" / "model.safetensors")
    assert result.keys() == body.state_dict().keys()


def with_pairs(embedders: Embedders, **fields: Any) -> dict[str, Any]:
    """The recipe with pairs to learn from, and to retrieve."""
    changed = copy.deepcopy(embedders.fields) | fields
    for task in changed["tasks"].values():
        task["calibration"]["text"] = ["first", "second"]
        del task["test"]["label"]
    return changed


def test_pairs_teach_and_are_retrieved(embedders: Embedders, tmp_path: Path) -> None:
    fields = with_pairs(embedders, preset="self-positioning")
    run = learn(
        parse_recipe(fields), root=embedders.root, out=tmp_path / "run", console=Console(quiet=True)
    )
    assert run.coefficients.objective == "contrastive"
    assert run.rows[-1].metric == "recall_at_1"
    assert [row.metric for row in run.rows[-1].further] == ["recall_at_10"]


def test_padding_of_pairs_is_in_no_statistic(embedders: Embedders, workspace: Workspace) -> None:
    fields = with_pairs(embedders)
    pairs = open_workspace(parse_recipe(fields), embedders.root)
    for task in fields["tasks"].values():
        task["calibration"]["text"] = "second"
    second = open_workspace(parse_recipe(fields), embedders.root)
    name = "bert.encoder.layer.*.output.dense.weight"
    places = {name: [0, 1]}
    base = workspace.base()
    grams = []
    for opened in (workspace, second, pairs):
        examples = opened.data.calibration[TASKS[0]]
        tokens = examples.take(np.arange(len(examples)), 16)["attention_mask"].sum()
        gram = open_statistics(opened).grams(0, base, places)[name]
        grams.append(np.asarray(gram, np.float64) * tokens)
    np.testing.assert_allclose(grams[0] + grams[1], grams[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "adamerging"}, "preset adamerging: entropy is for classes"),
        ({"objectives": [{"name": "logit_alignment"}]}, "objectives.0: logit_alignment is for"),
        ({"objectives": [{"name": "contrastive"}]}, "calibration.text: is one column"),
        ({"preset": "self-positioning"}, "calibration.text: is one column"),
        ({"heads": "refitted"}, "sentence embedders have none"),
        ({"evaluation": {"methods": [{"name": "fisher"}]}}, "evaluation.methods.0: fisher weighs"),
        ({"coefficients": {"initial_merge": {"name": "metrics_weighted"}}}, "initial_merge: metr"),
    ],
)
def test_choices_for_classes_are_refused(
    embedders: Embedders, workspace: Workspace, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        build(parse_recipe(embedders.fields | changes), workspace.models)


def test_merging_by_predictions_is_refused_before_anything_is_read(
    embedders: Embedders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", None)
    recipe = parse_recipe(embedders.fields)
    with pytest.raises(InputError, match="method: fisher weighs experts by what they predict"):
        merge(
            recipe,
            "fisher",
            {},
            root=embedders.root,
            out=tmp_path / "out",
            console=Console(quiet=True),
        )


def test_hidden_states_need_single_texts(embedders: Embedders, workspace: Workspace) -> None:
    chosen = [{"name": "hidden_state_alignment", "options": {"layers": [-1]}}]
    build(parse_recipe(embedders.fields | {"objectives": chosen}), workspace.models)
    with pytest.raises(InputError, match=r"calibration\.text: is two columns"):
        build(parse_recipe(with_pairs(embedders, objectives=chosen)), workspace.models)


def test_embedders_of_one_form_are_merged(embedders: Embedders, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(embedders.root / TASKS[1], other)
    fields = copy.deepcopy(embedders.fields)
    fields["tasks"][TASKS[1]]["expert"] = str(other)
    (other / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    with pytest.raises(InputError, match="pooling of expert 'colours' is 'mean', that of exper"):
        open_workspace(parse_recipe(fields), embedders.root)
    (other / "modules.json").unlink()
    with pytest.raises(InputError, match=r"'colours' is a sentence embedder .* 'animals' is none"):
        open_workspace(parse_recipe(fields), embedders.root)


def test_a_first_recipe_has_the_pairs(embedders: Embedders, tmp_path: Path) -> None:
    out, root = tmp_path / "recipe.yaml", embedders.root
    shutil.copy(root / f"{TASKS[0]}.jsonl", tmp_path / f"{TASKS[0]}.test.jsonl")
    shutil.copy(root / f"{TASKS[1]}.jsonl", tmp_path / f"{TASKS[1]}.test.jsonl")
    models = [str(root / name) for name in ("base", *TASKS)]
    cli.main(["new", *models, "--data", str(root), str(tmp_path), "--out", str(out)])
    recipe = load_recipe(out)
    assert "sentence embedder (bert)" in out.read_text()
    for task, fields in recipe.tasks.items():
        assert (fields.calibration.path, fields.calibration.label) == (
            str(root / f"{task}.jsonl"),
            None,
        )
        assert fields.test.path == f"{task}.test.jsonl"
        assert (fields.test.text, fields.test.label) == (("first", "second"), "score")
    build(recipe, open_models(recipe, tmp_path, read_weights=False))
