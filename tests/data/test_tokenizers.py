"""One tokenizer for the base and all experts: what differs is named."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import (
    BertConfig,
    ByT5Tokenizer,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
)

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from adamerge_jax.data import tokenizers
from adamerge_jax.data.tokenizers import encode, find_tokenizer, longest_text, padding_of
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import SPECIAL, TASKS, byte_tokenizer, save_models
from tests.references import bert_tokenizer, clip_tokenizer, edit_weights

ROWS = 420
"""Rows of the embeddings: some more than the tokenizer has tokens, as in many models."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its experts, each with the same tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
    )
    save_models(root, LlamaForCausalLM(config), byte_tokenizer())
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "models")


def models_in(root: Path) -> Models:
    tasks = {task: {"expert": task, "calibration": "none.jsonl"} for task in TASKS}
    return open_models(parse_recipe({"base": "base", "tasks": tasks}), root)


def give(root: Path, name: str, **options: Any) -> None:
    """Another tokenizer for one of the models."""
    drop(root, name)
    byte_tokenizer(**options).save_pretrained(root / name)


def drop(root: Path, name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / name / file).unlink(missing_ok=True)


def refused(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        find_tokenizer(models_in(root).by_name)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_the_same_tokenizer_everywhere(root, caplog):
    with caplog.at_level(logging.INFO, "adamerge_jax"):
        tokenizer = find_tokenizer(models_in(root).by_name)
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    assert caplog.messages == []


def test_the_same_files_are_not_loaded_again(root, monkeypatch):
    loaded = []
    load = tokenizers.load_tokenizer

    def load_and_tell(checkpoint: Checkpoint, role: str) -> PreTrainedTokenizerBase:
        loaded.append(role)
        return load(checkpoint, role)

    monkeypatch.setattr(tokenizers, "load_tokenizer", load_and_tell)
    file = root / "naming" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name_or_path": "other"}))
    assert find_tokenizer(models_in(root).by_name) is not None
    assert loaded == ["base", "expert 'naming'"]


def configure(root: Path, **fields: Any) -> None:
    """Other fields in the tokenizer_config.json of all models."""
    for name in ("base", *TASKS):
        file = root / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("length", [0, -1, 1, "long", float("nan"), True, [5], {}])
def test_lengths_that_no_text_has(root, length):
    configure(root, model_max_length=length)
    assert f"base ({root / 'base'}): model_max_length in its tokenizer_config.json is" in refused(
        root
    )


@pytest.mark.parametrize(("length", "expected"), [(2, 2), (512.0, 512), (1e30, sys.maxsize)])
def test_lengths_of_texts(root, length, expected):
    configure(root, model_max_length=length)
    assert longest_text(find_tokenizer(models_in(root).by_name)) == expected


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_tokenizer_is_never_run(root, known, caplog):
    """Neither asked for nor run, whatever the class is called."""
    mark = root / "run"
    for name in ("base", *TASKS):
        (root / name / "evil.py").write_text(
            f"open({str(mark)!r}, 'w')\n"
            "from transformers import PreTrainedTokenizerFast\n"
            "class Evil(PreTrainedTokenizerFast): pass\n"
        )
    fields = {} if known else {"tokenizer_class": "Evil"}
    configure(root, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, **fields)
    if known:
        with caplog.at_level(logging.WARNING, "adamerge_jax"):
            tokenizer = find_tokenizer(models_in(root).by_name)
        assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
        assert len(caplog.messages) == 1
        assert f"base ({root / 'base'}): its tokenizer names code of its own" in caplog.text
    else:
        assert "its tokenizer is code of its own (auto_map in tokenizer_config" in refused(root)
    assert not mark.exists()


def test_the_token_that_pads():
    """Masked, so that another takes its place where there is none that the model has."""
    assert padding_of(byte_tokenizer()) == SPECIAL.index("<pad>")
    without = byte_tokenizer(pad_token=None)
    assert padding_of(without) == SPECIAL.index("</s>")
    assert padding_of(byte_tokenizer(pad_token=None, eos_token=None)) == 0
    added = byte_tokenizer(pad_token="<added>")
    assert padding_of(added) == added.pad_token_id == len(added) - 1
    assert padding_of(added, len(added) - 1) == SPECIAL.index("</s>")


def test_a_tokenizer_that_fails(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=r"^here: the tokenizer .* cannot read") as caught:
        encode(tokenizer, ["a", "\ud800"], "here")
    assert "\n" not in str(caught.value)
    assert encode(tokenizer, ["a"], "here")["input_ids"] == tokenizer(["a"])["input_ids"]


def test_tokens_that_an_expert_added(root):
    give(root, "naming", tokens=[*SPECIAL[:4], "<tool>", *SPECIAL[4:]])
    said = refused(root)
    assert said.startswith(f"expert 'naming' ({root / 'naming'}) has another vocabulary than the ")
    # Those behind the new one have moved: the byte tokens too.
    known = byte_tokenizer().get_vocab()
    differing = len(known.keys() - SPECIAL[:4]) + 1
    assert f"than the base: {differing} token(s) differ: " in said
    assert (
        "'<tool>' is 4 there and missing in the base, '<|start|>' is 5 there and 4 in the base, "
    ) in said
    assert f" (and {differing - 3} more)" in said


def add_tokens(root: Path, name: str, tokens: list[str]) -> None:
    """As fine-tuning code does, within the rows that the embeddings have."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(root / name)


def test_a_token_in_a_free_row(root):
    first = len(byte_tokenizer())
    add_tokens(root, "rhyming", ["<rhyme>"])
    assert (
        f"1 token(s) differ: '<rhyme>' is {first} there and missing in the base; all "
        "models of a merge must have one tokenizer"
    ) in refused(root)


def test_a_token_that_an_expert_lacks(root):
    first = len(byte_tokenizer())
    add_tokens(root, "base", ["<a>", "<b>"])
    for task in TASKS[1:]:
        add_tokens(root, task, ["<a>", "<b>"])
    said = refused(root)
    assert said.startswith("expert 'counting'")
    assert (
        f"2 token(s) differ: '<a>' is missing there and {first} in the base, "
        f"'<b>' is missing there and {first + 1} in the base;"
    ) in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eos_token": "<|end|>"}, "has eos_token '<|end|>', the base has '</s>'"),
        ({"bos_token": None}, "has bos_token None, the base has '<s>'"),
        ({"unk_token": "<s>"}, "has unk_token '<s>', the base has '<unk>'"),
    ],
)
def test_other_special_tokens(root, options, named):
    give(root, "rhyming", **options)
    assert refused(root).startswith(f"expert 'rhyming' ({root / 'rhyming'}) {named}; the merge ")


def test_a_recipe_may_say_whose_tokenizer(root, caplog):
    give(root, "rhyming", eos_token="<|end|>")
    add_tokens(root, "naming", ["<name>"])
    with caplog.at_level(logging.WARNING, "adamerge_jax"):
        tokenizer = find_tokenizer(models_in(root).by_name, "naming")
    assert "<name>" in tokenizer.get_vocab() and tokenizer.eos_token == "</s>"
    assert "has eos_token '<|end|>'" in caplog.text
    assert caplog.text.count("lacks 1 token(s)") == 3
    # A token of another model that the chosen tokenizer does not have stays an error.
    with pytest.raises(InputError, match=r"'<name>' is .* there and missing in the base"):
        find_tokenizer(models_in(root).by_name, "base")
    with pytest.raises(InputError, match="tokenizer: 'nobody' is none of base, "):
        find_tokenizer(models_in(root).by_name, "nobody")


def test_a_chosen_model_without_a_tokenizer(root):
    drop(root, "counting")
    with pytest.raises(InputError, match=r"tokenizer: counting .* has none"):
        find_tokenizer(models_in(root).by_name, "counting")


@pytest.mark.parametrize("new", [False, True])
def test_another_padding_token_is_only_told(root, caplog, new):
    """None in the base; in the expert that which ends a text, or a new one."""
    for name in ("base", *TASKS[1:]):
        give(root, name, pad_token=None)
    if new:
        give(root, "counting", pad_token="<new>")
        assert len(byte_tokenizer(pad_token="<new>")) == len(byte_tokenizer()) + 1
    else:
        give(root, "counting", pad_token="</s>")
    with caplog.at_level(logging.WARNING, "adamerge_jax"):
        tokenizer = find_tokenizer(models_in(root).by_name)
    assert tokenizer.pad_token is None
    own = "<new>" if new else "</s>"
    assert caplog.messages == [
        f"expert 'counting' ({root / 'counting'}) has pad_token '{own}', the base has None: "
        "the merge has the latter"
    ]


def test_chat_templates_may_differ(root, caplog):
    give(root, "naming", chat_template="{{ messages }}")
    with caplog.at_level(logging.INFO, "adamerge_jax"):
        tokenizer = find_tokenizer(models_in(root).by_name)
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "expert 'naming'" in caplog.text and "another chat template than the base" in caplog.text


def test_models_without_a_tokenizer(root):
    for task in TASKS[1:]:
        drop(root, task)
    assert find_tokenizer(models_in(root).by_name) is not None
    # Then the first expert's takes the place of the base's.
    drop(root, "base")
    assert find_tokenizer(models_in(root).by_name) is not None
    give(root, "rhyming", eos_token="<|end|>")
    assert "has eos_token '<|end|>', expert 'counting' has '</s>'" in refused(root)
    for name in TASKS:
        drop(root, name)
    assert find_tokenizer(models_in(root).by_name) is None


def test_a_tokenizer_that_cannot_be_read(root):
    (root / "naming" / "tokenizer.json").write_text("{}")
    said = refused(root)
    assert said.startswith(f"expert 'naming' ({root / 'naming'}): its tokenizer cannot be read: ")


def add_row(folder: Path) -> None:
    """Gives a model a row of tokens more."""

    def grow(tensors: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.pad(tensors[name], [(0, 1), (0, 0)])

    edit_weights(folder, grow)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": ROWS + 1}))


def test_a_token_that_the_base_has_no_row_for(root):
    """Its weights can be merged, but texts are read by one tokenizer."""
    add_tokens(root, "naming", ["<new>"])
    add_row(root / "naming")
    assert "'<new>' is 333 there and missing in the base; all models" in refused(root)


def test_tokens_beyond_the_rows_of_the_base(root, caplog):
    """Texts are read without them where the recipe says so, as the merge reads them."""
    free = [f"<{number}>" for number in range(len(byte_tokenizer()), ROWS)]
    for name in ("base", *TASKS):
        add_tokens(root, name, [*free, "<new>"] if name == "naming" else free)
    add_row(root / "naming")
    models = models_in(root)
    assert "<new>" not in find_tokenizer(models.by_name, "base").get_vocab()
    assert "has 1 token(s) that the base has no rows for ('<new>')" in caplog.text
    with pytest.raises(InputError, match=r"'<new>' is 420 there .* \(tokenizer: base\), or leave"):
        find_tokenizer(models.by_name)
    with pytest.raises(InputError, match=r"'<new>' first: it has the base's tables"):
        find_tokenizer(models.by_name, "naming")


def without_weights(folder: Path, config: PreTrainedConfig) -> Checkpoint:
    """A checkpoint of which only the other files matter."""
    config.save_pretrained(folder)
    save_file({"a": np.ones(1, np.float32)}, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    "files", [["vocab.txt"], ["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]]
)
def test_files_that_are_a_tokenizer(tmp_path, files):
    checkpoint = without_weights(tmp_path, BertConfig())
    bert_tokenizer(tmp_path).save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if name not in files:
            (tmp_path / name).unlink()
    assert has_tokenizer(checkpoint)
    tokenizer = load_tokenizer(checkpoint, "base")
    assert tokenizer.tokenize("a b") == ["a", "b"]


def test_a_vocabulary_and_its_merges_are_a_tokenizer(tmp_path):
    checkpoint = without_weights(tmp_path, CLIPConfig())
    clip_tokenizer(tmp_path)
    assert load_tokenizer(checkpoint, "base").tokenize("cat") == ["cat</w>"]
    (tmp_path / "merges.txt").unlink()
    assert not has_tokenizer(checkpoint)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_is_a_tokenizer(tmp_path, name):
    checkpoint = without_weights(tmp_path, T5Config())
    assert not has_tokenizer(checkpoint)
    (tmp_path / name).write_bytes(b"")
    assert has_tokenizer(checkpoint)


def test_bytes_need_no_vocabulary(tmp_path):
    checkpoint = without_weights(tmp_path, T5Config())
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(checkpoint, "base").tokenize("ab") == ["a", "b"]


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), CLIPConfig()])
def test_settings_without_a_vocabulary(tmp_path, config):
    checkpoint = without_weights(tmp_path, config)
    with pytest.raises(InputError, match=r"^base \(.*\) has no tokenizer; save it there"):
        load_tokenizer(checkpoint, "base")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    with pytest.raises(InputError, match=r"^base \(.* has no vocabulary: the folder lacks "):
        load_tokenizer(checkpoint, "base")
