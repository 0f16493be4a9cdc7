"""Recipes for the models of the tests, as a user has them: in folders, with data beside them."""

import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from adamerge_jax.cli import main as cli
from adamerge_jax.data.locations import locate_data
from adamerge_jax.files.strict_yaml import read_yaml_file
from adamerge_jax.pipeline.example_loader import example_loader
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.json_schema import recipe_schema
from adamerge_jax.recipes.loading import load_recipe
from adamerge_jax.recipes.schema import Recipe
from tests.language_references import TASKS, byte_tokenizer, save_models, split_sentences
from tests.references import randomise, write_json_lines


def new(out: Path, *arguments: Any) -> Recipe:
    cli.main(["new", *map(str, arguments), "--out", str(out)])
    jsonschema.validate(read_yaml_file(out), recipe_schema())
    return load_recipe(out)


def paths(recipe: Recipe, part: str) -> list[str | None]:
    sources = [getattr(task, part) for task in recipe.tasks.values()]
    return [source and source.path for source in sources]


def test_a_classifier_of_texts(text_fields: dict[str, Any], tmp_path: Path, capsys):
    root = Path(text_fields["base"]).parent
    for name in ("base", "experts", "data"):
        (tmp_path / name).symlink_to(root / name)
    out = tmp_path / "my recipe.yaml"
    recipe = new(out, tmp_path / "base", tmp_path / "experts")
    tasks = sorted(text_fields["tasks"])
    assert list(recipe.tasks) == tasks
    assert recipe.base.path == "base"
    assert paths(recipe, "calibration") == [f"data/{task}.jsonl" for task in tasks]
    assert paths(recipe, "test") == [f"data/{task}.test.jsonl" for task in tasks]
    assert {task.test.label for task in recipe.tasks.values()} == {"label"}
    workspace = open_workspace(recipe, tmp_path)
    assert list(workspace.data.test) == tasks
    assert f"next    adamerge learn '{out}'" in capsys.readouterr().out
    assert "adamerge learn 'my recipe.yaml'" in out.read_text()
    # Comments are options: without their mark they are a recipe too.
    text = out.read_text()
    options = text.partition("# What is worth a try:\n")[2]
    out.write_text(text.replace(options, re.sub("^# ", "", options, flags=re.MULTILINE)))
    assert load_recipe(out).export.dtype == "bfloat16"


def test_nothing_is_overwritten(text_fields: dict[str, Any], tmp_path: Path, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    experts = Path(text_fields["base"]).parent / "experts"
    with pytest.raises(SystemExit) as stopped:
        new(out, text_fields["base"], experts)
    assert stopped.value.code == 2
    assert "mine.yaml is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert new(out, text_fields["base"], experts, "--force").name == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "BASE"], "is the base and an expert"),
        (["BASE"], "the following arguments are required|give the experts"),
        (["BASE", "EXPERTS", "--data", "nowhere"], "no such file or folder: nowhere"),
        (["BASE", "EXPERTS", "--data", "lav=data"], "'lav' is no task; they are "),
        (["EXPERTS", "BASE"], "has no model of its own"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    arguments, message, text_fields, tmp_path: Path, capsys
):
    places = {"BASE": text_fields["base"], "EXPERTS": Path(text_fields["base"]).parent / "experts"}
    with pytest.raises(SystemExit) as stopped:
        new(tmp_path / "recipe.yaml", *(places.get(a, a) for a in arguments))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert any(part in " ".join(printed.split()) for part in message.split("|"))
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_images_without_data(image_fields: dict[str, Any], tmp_path: Path, capsys):
    root = tmp_path / "models"  # nothing lies beside them
    for name in ("base", "shape", "colour"):
        shutil.copytree(Path(image_fields["base"]).parent / name, root / name)
    out = tmp_path / "recipe.yaml"
    recipe = new(out, root / "base", root / "shape", root / "colour")
    assert paths(recipe, "calibration") == [None, None]
    assert out.read_text().count("# calibration: DATA") == 2
    printed = capsys.readouterr().out
    assert "no data to learn from were found for shape, colour" in printed
    assert f"adamerge merge {out} --method ties" in printed

    data = Path(image_fields["base"]).parent / "shape.npz"
    recipe = new(
        out, root / "base", root / "shape", root / "colour", "--data", f"shape={data}", "--force"
    )
    assert paths(recipe, "calibration") == [str(data), None]


def test_zero_shot_heads(clip_fields: dict[str, Any], tmp_path: Path, capsys):
    root = Path(clip_fields["base"]).parent
    recipe = new(
        tmp_path / "recipe.yaml",
        *(root / name for name in ("base", "animals", "birds")),
        "--data",
        root / "images",
    )
    for task, fields in recipe.tasks.items():
        assert fields.calibration.path == fields.test.path == str(root / "images" / task)
        assert (fields.test.split, fields.test.label) == ("test", "label")
        locate_data(fields.test, tmp_path)
    assert "animals: no other data than test data were found" in capsys.readouterr().out


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template, and experts with one: conversations, prompts and texts."""
    root = tmp_path_factory.mktemp("decoders")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    save_models(root, model, tokenizer)
    byte_tokenizer(chat_template=None).save_pretrained(root / "base")
    (root / "base" / "chat_template.jinja").unlink(missing_ok=True)
    chats, prompts, texts = TASKS
    pairs = split_sentences(8, 1)
    turns = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in pairs
    ]
    for part in ("calibration", "test"):
        rows = {
            chats: [{"messages": turn} for turn in turns],
            prompts: [{"question": first, "answer": second} for first, second in pairs],
            texts: [{"text": first + second} for first, second in pairs],
        }
        for task, of_task in rows.items():
            write_json_lines(root / "data" / f"{task}.{part}.jsonl", of_task)
    return root


def test_a_language_model(decoders: Path, tmp_path: Path):
    out = tmp_path / "recipe.yaml"
    recipe = new(out, decoders / "base", *(decoders / task for task in TASKS))
    chats, prompts, texts = recipe.tasks.values()
    assert chats.calibration.messages == "messages"
    assert (prompts.test.prompt, prompts.test.response) == ("question", "answer")
    assert texts.test.text == "text"
    # The base could not write the conversations.
    assert recipe.tokenizer == TASKS[0]
    assert recipe.objectives[0].options == {"top_tokens": 64}
    assert recipe.max_length == 128
    models = open_models(recipe, tmp_path, read_weights=False)
    load = example_loader(models, tmp_path, tokenizer=recipe.tokenizer, max_length=128, seed=0)
    for task, fields in recipe.tasks.items():
        assert len(load(fields.test, task)) == 8


def test_models_that_are_merged_by_the_names_of_their_tensors(tmp_path: Path, capsys):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    for name in ("base", "one", "two"):
        # Its type has a family here, which does not know its head.
        model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2))
        randomise(model, seed=len(name)).save_pretrained(tmp_path / name)
    out = tmp_path / "recipe.yaml"
    recipe = new(out, *(tmp_path / name for name in ("base", "one", "two")))
    assert list(recipe.tasks) == ["one", "two"]
    assert out.read_text().startswith("# 2 experts of one base: models merged by name (bert).")
    assert "note: nothing can be learned: " in capsys.readouterr().out
    open_models(recipe, tmp_path, read_weights=False, to_run=False)


def test_data_that_are_elsewhere_or_empty(decoders: Path, tmp_path: Path, capsys):
    chats, prompts, texts = TASKS
    (tmp_path / f"{prompts}.jsonl").touch()
    out = tmp_path / "recipe.yaml"
    models = [decoders / name for name in ("base", chats, prompts, texts)]
    recipe = new(out, *models, "--data", f"{chats}=org/chats", tmp_path)
    assert recipe.tasks[chats].calibration.path == "org/chats"
    assert "# test: {path: org/chats, split: test}  # look up its splits" in out.read_text()
    printed = capsys.readouterr().out
    assert f"{prompts}.jsonl is left out as calibration data: it is empty" in printed
    assert f"no data to learn from were found for {prompts}, {texts}" in printed
