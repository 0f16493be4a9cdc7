"""Experts whose tables of tokens have other numbers of rows than the base's."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from adamerge_jax.checkpoints import vocabulary
from adamerge_jax.checkpoints.tokenizer_files import load_tokenizer
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.export import export_mergekit
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import SPECIAL, byte_tokenizer, language_expert
from tests.references import (
    merge_by_task_arithmetic,
    random_coefficients,
    randomise,
    require_sum,
    write_recipe,
)

TOKENS = len(byte_tokenizer())
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
SIZES = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=TOKENS)))


def save(
    model: LlamaForCausalLM,
    folder: Path,
    rows: int,
    *added: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Saves a model after `resize_token_embeddings`, with new tokens, and returns its tensors."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.to(dtype).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    tasks = {task: {"expert": str(folder / task)} for task in ("padded", "chat")}
    return {"base": str(folder / "base"), "tasks": tasks, "export": {"orbax": False}} | more


def merge(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    checkpoint = merge_by_task_arithmetic(write_recipe(folder, fields), folder / "out")
    return load_file(checkpoint / "model.safetensors")


def require_merge(merged: dict, base: dict, experts: list[dict]) -> None:
    """By float64: a row that an expert has not is one that it did not change."""
    assert merged.keys() == base.keys()
    for name, start in base.items():
        rows = [expert[name][: len(start)] for expert in experts]
        whole = [torch.cat([shared.to(start), start[len(shared) :]]) for shared in rows]
        require_sum(merged[name], start, whole, rtol=0, atol=1e-6, name=name)


def test_shared_rows_are_merged_and_the_others_are_the_bases(model, tmp_path, capsys):
    rows = -(-TOKENS // 64) * 64
    base = save(model, tmp_path / "base", TOKENS + 4)
    padded = save(language_expert(model, 1), tmp_path / "padded", rows)
    chat = save(language_expert(model, 2), tmp_path / "chat", TOKENS, dtype=torch.bfloat16)
    require_merge(merge(tmp_path, recipe(tmp_path)), base, [padded, chat])
    lines = [
        f"expert 'padded': its tables of tokens have {rows} rows, the base's {TOKENS + 4}: rows "
        f"from {TOKENS + 4} on are left out",
        f"expert 'chat': its tables of tokens have {TOKENS} rows, the base's {TOKENS + 4}: rows "
        f"from {TOKENS} on are the base's",
    ]
    printed = " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    for line in lines:
        assert line in printed and line in card
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint")
    assert merged.lm_head.weight.shape[0] == TOKENS + 4


def test_added_tokens_are_named(model, tmp_path, caplog):
    base = save(model, tmp_path / "base", TOKENS)
    padded = save(language_expert(model, 1), tmp_path / "padded", TOKENS)
    chat = save(language_expert(model, 2), tmp_path / "chat", TOKENS + 2, "<|in|>", "<|out|>")
    require_merge(merge(tmp_path, recipe(tmp_path)), base, [padded, chat])
    said = "2 token(s) that the base has no rows for ('<|in|>', '<|out|>'): they are left out"
    assert said in caplog.text
    # They cannot be the merge's tokenizer.
    models = open_models(parse_recipe(recipe(tmp_path)), tmp_path)
    assert tokenizer_owner(models.by_name, None) is models.base
    with pytest.raises(InputError, match=r"expert 'chat' .* has 2 token\(s\) that the merge has"):
        tokenizer_owner(models.by_name, "chat")
    said = "mergekit cannot make this merge: .*: expert 'chat': its tables of tokens have"
    with pytest.raises(InputError, match=said):
        export_mergekit(models, random_coefficients(models), tmp_path / "merge.yaml", None)


def test_ids_that_mean_other_tokens_are_refused(model, tmp_path):
    save(model, tmp_path / "base", TOKENS)
    save(model, tmp_path / "padded", TOKENS + 60)
    save(model, tmp_path / "chat", TOKENS + 60)
    swapped = [SPECIAL[1], SPECIAL[0], *SPECIAL[2:]]
    byte_tokenizer(tokens=swapped).save_pretrained(tmp_path / "chat")
    with pytest.raises(
        InputError, match=rf"expert 'chat' .*: 2 of {TOKENS} ids differ: 0 is '<s>' there and '<p"
    ):
        open_models(parse_recipe(recipe(tmp_path)), tmp_path)


def test_a_config_of_another_size_than_the_weights_is_refused(model, tmp_path):
    save(model, tmp_path / "base", TOKENS)
    for task in ("padded", "chat"):
        save(model, tmp_path / task, TOKENS)
    file = tmp_path / "chat" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": TOKENS + 1}))
    with pytest.raises(InputError, match=rf"vocab_size {TOKENS + 1} .* has {TOKENS} rows"):
        open_models(parse_recipe(recipe(tmp_path)), tmp_path)


def test_tied_tables_and_tables_in_a_file_twice(tmp_path):
    tied = LlamaConfig(**SIZES, vocab_size=TOKENS, tie_word_embeddings=True)
    model = randomise(LlamaForCausalLM(tied))
    base = save(model, tmp_path / "base", TOKENS)
    padded = save(language_expert(model, 1), tmp_path / "padded", TOKENS + 3)
    chat = save(language_expert(model, 2), tmp_path / "chat", TOKENS - 3)
    for task, tensors in (("padded", padded), ("chat", chat)):
        twice = tensors | {TABLES[1]: tensors[TABLES[0]].clone()}
        save_file(twice, tmp_path / task / "model.safetensors", metadata={"format": "pt"})
    require_merge(merge(tmp_path, recipe(tmp_path)), base, [padded, chat])


def test_tables_of_other_names(tmp_path, monkeypatch):
    """The output layer is a table too; the base's tokens are looked up once for all experts."""
    roles = []

    def load(checkpoint, role):
        roles.append(role)
        return load_tokenizer(checkpoint, role)

    monkeypatch.setattr(vocabulary, "load_tokenizer", load)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=TOKENS)))
    base = save(model, tmp_path / "base", TOKENS)
    padded = save(language_expert(model, 1), tmp_path / "padded", TOKENS + 3)
    save(language_expert(model, 2), tmp_path / "chat", TOKENS - 3)
    models = open_models(parse_recipe(recipe(tmp_path)), tmp_path, to_run=False)
    assert sorted(roles) == ["base", "expert 'chat'", "expert 'padded'"]
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        assert padded[name].shape[0] == TOKENS + 3
        read = models.experts["padded"].read(name)
        np.testing.assert_array_equal(read, padded[name][:TOKENS])
        np.testing.assert_array_equal(models.experts["chat"].read(name)[-3:], base[name][-3:])
