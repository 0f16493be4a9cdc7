"""General text, on which a merge is to stay as the base is."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from adamerge_jax.cli import main as cli
from adamerge_jax.data.copies import WithCopies
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.retention import GENERAL_TEXT, RETAINED, Retention
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.pipeline import general
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import TASKS, byte_tokenizer, give_data, save_models
from tests.learning.test_language_learning import SIZES, chats
from tests.references import learning_inputs, write_json_lines, write_recipe

WORDS = ("cat", "dog", "fox", "cow", "hen", "bee", "red", "blue", "green", "runs", "eats", "sings")
PROMPTS = [{"prompt": f"{a} {b} ?"} for a in WORDS for b in WORDS][:60]


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> dict[str, Any]:
    """A recipe for a Llama on conversations, whose base answers 60 prompts."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return fields_of(model, tmp_path_factory.mktemp("chat"))


def fields_of(model: PreTrainedModel, root: Path) -> dict[str, Any]:
    """The fields of a recipe for experts of a model, whose base answers 60 prompts."""
    fields = save_models(root, model, byte_tokenizer())
    fields = give_data(fields, root, {task: chats(seed) for seed, task in enumerate(TASKS)})
    prompts = write_json_lines(root / "general.jsonl", PROMPTS)
    return fields | {
        "preset": "adamerging",
        "objectives": [{"name": "logit_alignment", "options": {"top_tokens": 16}}],
        "learning": {"steps": 2, "batch_size": 4},
        "retain": {"path": str(prompts), "new_tokens": 12},
    }


@pytest.fixture(scope="module")
def run(chat, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, chat | {"export": {"orbax": False}})
    cli.main(["learn", str(recipe), "--out", str(folder / "run")])
    return folder / "run"


def test_the_base_writes_the_answers(chat, tmp_path):
    """Those of `transformers`, with the token that ends them; they alone are predicted."""
    require_answers_of_base(chat, tmp_path)


def test_a_base_without_a_cache_writes_them_where_it_is_asked(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**sizes, vocab_size=SIZES["vocab_size"], bos_token_id=1, eos_token_id=2)
    fields = fields_of(GPT2LMHeadModel(config), tmp_path)
    require_answers_of_base(fields, tmp_path)
    by_default = open_workspace(parse_recipe(fields | {"retain": {"weight": 1}}), tmp_path)
    assert by_default.general is None


def require_answers_of_base(chat: dict[str, Any], tmp_path: Path) -> None:
    workspace = open_workspace(parse_recipe(chat), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(chat["base"])
    for examples, count in ((workspace.general.test, 20), (workspace.general.learning, 16)):
        assert len(examples) == count
        index = np.arange(count)
        length = examples.padded_length(index)
        inputs, labels = examples.take(index, length), examples.take_labels(index, length)
        for ids, mask, targets in zip(*inputs.values(), labels, strict=True):
            ids = ids[: mask.sum()].tolist()
            answer = targets[targets != NOT_PREDICTED].tolist()
            prompt = ids[: len(ids) - len(answer)]
            assert ids == prompt + answer
            written = base.generate(
                torch.tensor([prompt]),
                max_new_tokens=min(12, 32 - len(prompt)),
                do_sample=False,
                eos_token_id=[2, 5],
            )
            assert written[0].tolist() == ids


def test_the_base_is_one_more_task(chat, tmp_path):
    """The divergence from it is 0 where the merge is the base, and over 0 where it is not."""
    inputs = learning_inputs(
        parse_recipe(chat | {"retain": chat["retain"] | {"weight": 2}}), tmp_path
    )
    assert list(inputs.calibration.examples) == [*TASKS, RETAINED]
    # Each task has 15 examples, of which 3 are held out: there are no more of the base.
    assert {task: len(index) for task, index in inputs.calibration.held_out.items()} == (
        dict.fromkeys([*TASKS, RETAINED], 3)
    )
    assert len(inputs.calibration.learning[RETAINED]) == 13
    shown = []

    class Stage:
        def __init__(self, summary, steps): ...

        def __enter__(self):
            return shown.append

        def __exit__(self, *error): ...

    for initial in (0.0, 0.4):
        method = inputs.method._replace(initial=initial, constraint="free")
        learn_coefficients(inputs._replace(method=method), show_stage=Stage)
    at_base, at_merge = (shown[at].held_out.objective for at in (0, 3))
    assert at_base.shape == (4,)
    assert at_base[-1] == pytest.approx(0, abs=1e-5)
    assert at_merge[-1] > 0.01
    # Its weight is a factor.
    once = learning_inputs(parse_recipe(chat), tmp_path)
    shown.clear()
    learn_coefficients(once._replace(method=once.method._replace(initial=0.4)), show_stage=Stage)
    assert 2 * shown[0].held_out.objective[-1] == pytest.approx(at_merge[-1], rel=1e-4)


def test_the_table_says_what_is_kept(run):
    tables = json.loads((run / "results.json").read_text())["further"]
    rows = {}
    for table in tables:
        metric = table["rows"][0]["metric"]
        if metric.startswith("base_"):
            rows[metric] = {row["method"]: row["tasks"][GENERAL_TEXT] for row in table["rows"]}
    assert list(rows) == ["base_answers", "base_agreement", "base_divergence"]
    # One model each, so that there is no row of the experts.
    methods = ["base", "average", "task arithmetic (0.3)", "learned (tensor)"]
    assert all(list(by_method) == methods for by_method in rows.values())
    assert (rows["base_answers"]["base"], rows["base_agreement"]["base"]) == (1, 1)
    assert 0 <= rows["base_divergence"]["base"] < 1e-5
    assert all(value > 1e-3 for value in list(rows["base_divergence"].values())[1:])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(list((run / "report").glob("curves*.png"))) == len(TASKS) + 1
    assert list(steps[1]["objective"]) == list(steps[0]["held_out"]) == [*TASKS, RETAINED]


def test_measures_against_numpy():
    """Agreement, divergence and first sentences of a model whose logits are given."""
    generator = np.random.default_rng(0)
    base, model = generator.normal(size=(2, 3, 6, 20)).astype(np.float32)
    model[0] = base[0]
    labels = np.full((3, 6), NOT_PREDICTED)
    for row, places in enumerate(([1, 2, 3], [0, 1], [2, 3, 4, 5])):
        labels[row, places] = base[row, places].argmax(-1)
    model[2, 2] = base[2, 2]
    model[2, 3:] = -base[2, 3:]

    class Given(general.Examples):
        def __len__(self):
            return 3

        def padded_length(self, index):
            return 6

        def take(self, index, length):
            return {"row": np.asarray(index)}

        def take_labels(self, index, length):
            return labels[index]

    def logits_of(logits):
        return lambda inputs: jnp.asarray(logits)[inputs["row"]]

    text = general.General(None, Given(), np.array([3, 2, 1]))
    retention = Retention(text, lambda inputs: (logits_of(base)(inputs), {}), batch_size=2)
    measures = retention.measures(logits_of(model))
    counted = labels != NOT_PREDICTED
    logs = [np.asarray(jax.nn.log_softmax(logits)) for logits in (base, model)]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    agrees = base.argmax(-1) == model.argmax(-1)
    np.testing.assert_allclose(
        measures["base_divergence"].values, (divergence * counted).sum(-1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(measures["base_agreement"].values, (agrees & counted).sum(-1))
    np.testing.assert_array_equal(measures["base_agreement"].counts, counted.sum(-1))
    # The last one leaves the base after its first sentence.
    assert measures["base_answers"].values[[0, 2]].tolist() == [1, 1]
    assert not agrees[1, :2].all() and measures["base_answers"].values[1] == 0


def test_the_plan_counts_it(chat, tmp_path):
    merge, recipe = outline(parse_recipe(chat), tmp_path), parse_recipe(chat)
    workspace = open_workspace(recipe, tmp_path)
    assert list(merge.heads) == list(workspace.heads) == [*TASKS, RETAINED]
    planned = merge.data["calibration"][RETAINED]
    assert len(planned) == len(workspace.general.learning)
    # Answers may be shorter than they may be long.
    assert (planned.lengths >= workspace.general.learning.padded_lengths()).all()
    learning = merge.learning()
    batch = merge.batch(merge.longest)
    _, objectives = jax.eval_shape(learning.learner.step, learning.state, learning.frozen, batch)
    assert objectives.shape == (4,)
    without = outline(parse_recipe(chat | {"retain": None}), tmp_path)
    assert list(without.heads) == list(without.data["calibration"]) == list(TASKS)


def test_only_measured_with_weight_0(chat, tmp_path):
    inputs = learning_inputs(
        parse_recipe(chat | {"retain": chat["retain"] | {"weight": 0}}), tmp_path
    )
    assert list(inputs.calibration.examples) == list(TASKS)
    assert len(inputs.workspace.evaluator.retention) == 20


@pytest.mark.parametrize("retain", ["none", None])
def test_without_general_text(chat, retain, tmp_path):
    workspace = open_workspace(parse_recipe(chat | {"retain": retain}), tmp_path)
    assert workspace.general is workspace.evaluator.retention is None
    assert list(workspace.heads) == list(TASKS)


def test_the_packages_prompts_are_the_default_of_chat_models(chat, tmp_path):
    fields = {name: value for name, value in chat.items() if name != "retain"}
    # Too few fit into 32 tokens of this tokenizer, which knows few words.
    assert open_workspace(parse_recipe(fields), tmp_path).general is None
    fits = open_workspace(parse_recipe(fields | {"max_length": 96}), tmp_path).general
    assert len(fits.test) + len(fits.learning) > 20
    rows = [{"text": "the red cat runs ."}] * 15
    texts = give_data(fields, tmp_path, dict.fromkeys(TASKS, rows)) | {"max_length": 96}
    assert open_workspace(parse_recipe(texts), tmp_path).general is None


def test_general_text_with_answers(chat, tmp_path):
    """Texts are read as they are; nothing is said of the base's answers to them."""
    rows = [{"text": f"the {a} {b} ."} for a in WORDS for b in WORDS][:30]
    retain = {"path": str(write_json_lines(tmp_path / "texts.jsonl", rows)), "limit": 27}
    found = open_workspace(parse_recipe(chat | {"retain": retain}), tmp_path)
    assert (len(found.general.test), len(found.general.learning)) == (9, 16)
    assert found.general.openings is None


def test_too_few(chat, tmp_path):
    few = write_json_lines(tmp_path / "few.jsonl", PROMPTS[:6])
    with pytest.raises(InputError, match=r"few\.jsonl has too few .*: 4 to learn .* where 5 and 2"):
        open_workspace(parse_recipe(chat | {"retain": {"path": str(few)}}), tmp_path)


def test_language_models_have_no_copies_of_examples(chat, tmp_path):
    recipe = parse_recipe(chat | {"learning": chat["learning"] | {"copies": 2}})
    calibration = learning_inputs(recipe, tmp_path).calibration
    for task, index in calibration.learning.items():
        assert index.max() < len(calibration.examples[task])
        assert not isinstance(calibration.examples[task], WithCopies)


def test_classifiers_have_no_general_text(text_recipe, tmp_path):
    text = write_json_lines(tmp_path / "general.jsonl", [{"text": "a"}] * 20)
    recipe = parse_recipe(text_recipe | {"retain": {"path": str(text)}})
    with pytest.raises(InputError, match="retain: is for language models"):
        open_workspace(recipe, tmp_path)
