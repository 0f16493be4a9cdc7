"""Experts whose tables of tokens have other numbers of rows than the base's."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from adamerge_jax.checkpoints import vocabulary
from adamerge_jax.checkpoints.tokenizer_files import load_tokenizer
from adamerge_jax.cli import main as cli
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.export import export_mergekit
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.runs.results import read_results
from tests.language_references import SPECIAL, TEXTS, byte_tokenizer, language_expert
from tests.references import (
    merge_by_task_arithmetic,
    random_coefficients,
    randomise,
    require_sum,
    write_json_lines,
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


def test_weights_of_another_size_than_the_config_are_refused(model, tmp_path):
    """Also where the config says what the base's says."""
    for name in ("base", "padded"):
        save(model, tmp_path / name, TOKENS)
    save(model, tmp_path / "chat", TOKENS + 3)
    file = tmp_path / "chat" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": TOKENS}))
    with pytest.raises(InputError, match=rf"vocab_size {TOKENS} .* has {TOKENS + 3} rows"):
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


ADDED = ("<|in|>", "<|out|>")


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_come_with_the_tokenizer(tied, tmp_path, capsys):
    """Their rows are those of the expert; another expert with the same tokens merges into them."""
    rows = TOKENS + 6
    model = randomise(
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=TOKENS, tie_word_embeddings=tied))
    )
    base = save(model, tmp_path / "base", TOKENS)
    padded = save(language_expert(model, 1), tmp_path / "padded", TOKENS)
    chat = save(language_expert(model, 2), tmp_path / "chat", rows, *ADDED)
    alike = save(language_expert(model, 3), tmp_path / "alike", TOKENS + 2, *ADDED)
    fields = recipe(tmp_path, tokenizer="chat")
    fields["tasks"]["alike"] = {"expert": str(tmp_path / "alike")}
    merged = merge(tmp_path, fields)
    own_rows = {name: chat[name][TOKENS:] for name in TABLES if name in base}
    start = {n: torch.cat([base[n], own_rows[n]]) if n in own_rows else base[n] for n in base}
    require_merge(merged, start, [padded, chat, alike])
    printed = " ".join(capsys.readouterr().out.split())
    note = f"base: rows of tokens from {TOKENS} on are those of expert 'chat'"
    assert note in printed and "2 token(s) ('<|in|>', '<|out|>')" in printed
    checkpoint = tmp_path / "out" / "checkpoint"
    opened = LlamaForCausalLM.from_pretrained(checkpoint)
    assert opened.config.vocab_size == len(opened.model.embed_tokens.weight) == rows
    assert AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(ADDED[1]) == TOKENS + 1


def test_coefficients_are_learned_with_added_tokens(model, tmp_path):
    """The expert is asked with its tokens, and folding gives the same bytes."""
    save(model, tmp_path / "base", TOKENS)
    save(language_expert(model, 1), tmp_path / "padded", TOKENS)
    save(language_expert(model, 2), tmp_path / "chat", TOKENS + 2, *ADDED)
    fields = recipe(tmp_path, tokenizer="chat", max_length=32)
    texts = [{"text": f"{ADDED[0]}{text}{ADDED[1]}"} for text in TEXTS[:6]]
    for name, task in fields["tasks"].items():
        data = str(write_json_lines(tmp_path / f"{name}.jsonl", texts))
        task |= {"calibration": data, "test": {"path": data, "end_of_text": "leave"}}
    file, run, again = (
        write_recipe(tmp_path, fields | {"learning": {"steps": 2, "batch_size": 2}}),
        tmp_path / "run",
        tmp_path / "again",
    )
    cli.main(["learn", str(file), "--out", str(run)])
    cli.main(["fold", str(file), str(run), "--out", str(again)])
    weights = [folder / "checkpoint" / "model.safetensors" for folder in (run, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = {row.kind: row.tasks["chat"] for row in read_results(run / "results.json").rows}
    for kind, folder in [("experts", tmp_path / "chat"), ("learned", run / "checkpoint")]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = LlamaForCausalLM.from_pretrained(folder)
        ids = [tokenizer(row["text"])["input_ids"] for row in texts]
        losses = [network(torch.tensor([i]), labels=torch.tensor([i])).loss.item() for i in ids]
        expected = np.average(losses, weights=[len(tokens) - 1 for tokens in ids])
        assert all(tokens[0] == TOKENS and tokens[-1] == TOKENS + 1 for tokens in ids)
        assert rows[kind] == pytest.approx(expected, abs=1e-4)


def trained(adapted: PeftModel) -> PeftModel:
    """An adapter with changes to all that it trains."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapted


def test_adapters_with_other_rows(model, tmp_path, caplog, capsys):
    """One that saved longer tables and one whose factors are of shorter ones, merged both ways."""
    base = save(model, tmp_path / "base", TOKENS)
    tokenizer = byte_tokenizer()
    plain = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapted = trained(get_peft_model(copy.deepcopy(model), plain))
    adapted.save_pretrained(tmp_path / "padded", save_embedding_layers=False)
    tokenizer.add_tokens(list(ADDED))
    longer = copy.deepcopy(model)
    longer.resize_token_embeddings(TOKENS + 2, mean_resizing=False)
    with_tables = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    chat = trained(get_peft_model(longer, with_tables))
    chat.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    experts = [
        {name: tensor.detach() for name, tensor in e.merge_and_unload().state_dict().items()}
        for e in (adapted, chat)
    ]
    require_merge(merge(tmp_path, recipe(tmp_path, tokenizer="base")), base, experts)
    assert "expert 'chat'" in caplog.text and "2 token(s) that the base has no rows" in caplog.text
    (tmp_path / "out").rename(tmp_path / "short")
    merged = merge(tmp_path, recipe(tmp_path, tokenizer="chat"))
    start = {
        name: torch.cat([base[name], experts[1][name][TOKENS:]]) if name in TABLES else base[name]
        for name in base
    }
    require_merge(merged, start, experts)
    fields = recipe(tmp_path, tokenizer="chat", export={"orbax": False, "adapter": True})
    with pytest.raises(SystemExit):
        merge_by_task_arithmetic(write_recipe(tmp_path, fields), tmp_path / "adapter")
    assert "tokens that the base has no rows for" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
