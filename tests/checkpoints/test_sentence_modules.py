"""Module files of sentence embedders: those of old and new versions, and strangers' ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adamerge_jax.checkpoints.sentence_modules import (
    is_embedder,
    read_embedding_form,
    write_embedding_form,
)
from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import EmbeddingForm

OLD = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_cls_token": True},
    "sentence_xlm-roberta_config.json": {"max_seq_length": 12, "do_lower_case": True},
}
_MODULES = "sentence_transformers.sentence_transformer.modules"
NEW = {
    "modules.json": [
        {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"path": "1_Pooling", "type": f"{_MODULES}.pooling.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
    ],
    "1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "lasttoken"},
    "2_Normalize/config.json": {"module_input_name": "sentence_embedding"},
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "last_hidden_state"}
        },
        "module_output_name": "token_embeddings",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "find: ", "document": None},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    },
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_old_and_new_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(), (tmp_path / "new").mkdir()
    old = read_embedding_form(write(tmp_path / "old", OLD), 8)
    assert old == EmbeddingForm("cls", False, max_tokens=12, lowercase=True)
    assert old.as_read("A b") == "a b"
    new = read_embedding_form(write(tmp_path / "new", NEW), 8)
    assert (new.pooling, new.normalised, new.similarity) == ("lasttoken", True, "dot")
    assert new.as_read("a") == "find: a"


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("normalised", [True, False])
def test_written_files_are_read_again(tmp_path: Path, pooling: Any, normalised: bool) -> None:
    form = EmbeddingForm(
        pooling, normalised, 9, True, {"q": "find: ", "d": ""}, "q", similarity="dot"
    )
    write_embedding_form(tmp_path, form, 8)
    assert read_embedding_form(tmp_path, 8) == form


def test_a_classifier_beside_module_files_is_one(tmp_path: Path) -> None:
    assert not is_embedder(tmp_path)
    write(tmp_path, NEW)
    assert is_embedder(tmp_path)
    for name, expected in (("BertModel", True), ("BertForSequenceClassification", False)):
        write(tmp_path, {"config.json": {"architectures": [name]}})
        assert is_embedder(tmp_path) == expected


def of(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    def change(files: dict[str, Any]) -> None:
        files[name] = {**files.get(name, {}), **fields}

    return change


def module(number: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    def change(files: dict[str, Any]) -> None:
        files["modules.json"] = [
            {**entry, **(fields if place == number else {})}
            for place, entry in enumerate(files["modules.json"])
        ]

    return change


def whole(name: str, content: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda files: files.update({name: content})


POOLING, TEXTS, MODEL = (
    *("1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (whole("modules.json", "{"), "not JSON"),
        (whole("modules.json", {}), "no list"),
        (whole("modules.json", [1]), "no type"),
        (whole("modules.json", []), "none; expected Transformer"),
        (module(1, type="os.system"), "os.system is not supported"),
        (module(1, type="sentence_transformers.models.Dense"), "models.Dense is not supported"),
        (module(2, type="my_model.Normalize"), "my_model.Normalize is not supported"),
        (module(2, type="sentence_transformers.models.Pooling"), "Transformer, Pooling, Pooling"),
        (module(0, path="0_Transformer"), "expected the folder itself"),
        (module(1, path="../elsewhere"), "expected the name of a folder"),
        (module(1, path="/etc"), "expected the name of a folder"),
        (module(1, path=["1_Pooling"]), "expected the name of a folder"),
        (module(1, path="3_Pooling"), "3_Pooling/config.json is not JSON"),
        (whole(POOLING, []), "no fields"),
        (of(POOLING, pooling_mode="max"), "supported is one of mean, cls, lasttoken"),
        (of(POOLING, pooling_mode=["mean", "cls"]), "the pooling is ['mean', 'cls']"),
        (of(POOLING, pooling_mode={"a": 1}), "the pooling is"),
        (of(POOLING, embedding_dimension=16), "embeddings have 16 features, the model's tokens 8"),
        (of(POOLING, include_prompt=False), "include_prompt is False"),
        (of("2_Normalize/config.json", module_input_name="x"), "module_input_name is 'x'"),
        (of(TEXTS, max_seq_length=0), "max_seq_length is 0"),
        (of(TEXTS, max_seq_length=True), "max_seq_length is True"),
        (of(TEXTS, transformer_task="fill-mask"), "transformer_task is 'fill-mask'"),
        (of(TEXTS, modality_config={"image": {}}), "supported are texts"),
        (of(TEXTS, modality_config={"text": {"method": "generate"}}), "supported are texts"),
        (of(MODEL, model_type="SparseEncoder"), "model_type is 'SparseEncoder'"),
        (of(MODEL, similarity_fn_name="manhattan"), "similarity_fn_name is 'manhattan'"),
        (of(MODEL, similarity_fn_name=["dot"]), "similarity_fn_name is ['dot']"),
        (of(MODEL, prompts=[1]), "prompts are [1]"),
        (of(MODEL, prompts={"query": 1}), "expected texts by name"),
        (of(MODEL, default_prompt_name="other"), "none of prompts"),
        (of(MODEL, default_prompt_name=["query"]), "none of prompts"),
    ],
)
def test_others_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    files = dict(NEW)
    change(files)
    with pytest.raises(InputError) as refused:
        read_embedding_form(write(tmp_path, files), 8)
    assert words in str(refused.value) and "\n" not in str(refused.value)
