"""The module files of sentence embedders, as the library sentence-transformers writes them.

A folder of it is a checkpoint with `modules.json`, a list of modules that a text goes through: the
model, a pooling and perhaps a normalisation. Further settings are in a file or folder each. Files
of its versions 2 to 6 are read; those that are written are read by all of these.

A module's type names a Python class. It is compared with the known ones, and never imported.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from adamerge_jax.checkpoints.config_file import CONFIG_FILE, classes_of
from adamerge_jax.errors import InputError, shorten
from adamerge_jax.files.json_object import (
    read_list,
    read_object,
    read_object_if_there,
    write_json,
)
from adamerge_jax.models.embedding_form import EmbeddingForm, Pooling, Similarity

MODULES_FILE = "modules.json"

_MODEL_FILE = "config_sentence_transformers.json"

_TEXT_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files of the settings of texts; the newest name comes first."""

_PACKAGE = "sentence_transformers."

_KNOWN = ("Transformer", "Pooling", "Normalize")
"""The kinds of modules that are known, in the order in which a text goes through them."""

_POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
"""The poolings of sentence-transformers, and the switch of each in files of older versions."""

_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""The name of a module's folder, which lies in the checkpoint's."""


def is_embedder(folder: Path) -> bool:
    """Returns True if the folder of a checkpoint is that of a sentence embedder.

    A classifier that was trained from one, or a cross-encoder, may have module files beside it.
    """
    if not (folder / MODULES_FILE).is_file():
        return False
    classes = classes_of(read_object_if_there(folder / CONFIG_FILE))
    return not any(name.endswith("Classification") for name in classes)


def read_embedding_form(folder: Path, features: int | None) -> EmbeddingForm:
    """Reads the module files of a sentence embedder.

    Args:
        folder: The folder of the checkpoint.
        features: H, the features of the model's tokens; None where they are not known.

    Raises:
        InputError: A file is missing or damaged, or asks for something that is not known here.
    """
    folders = _read_modules(folder)
    pooling = _read_pooling(folders["Pooling"], features)
    if "Normalize" in folders:
        _require_of_embedding(folders["Normalize"] / "config.json")
    max_tokens, lowercase = _read_texts(folder)
    model_file = folder / _MODEL_FILE
    model_fields = read_object_if_there(model_file)
    similarity = _similarity(model_fields, model_file)
    prompts, default = _prompts(model_fields, model_file)
    return EmbeddingForm(
        pooling=pooling,
        normalised="Normalize" in folders,
        max_tokens=max_tokens,
        lowercase=lowercase,
        prompts=prompts,
        default_prompt=default,
        similarity=similarity,
    )


def write_embedding_form(folder: Path, form: EmbeddingForm, features: int) -> None:
    """Writes the module files of a sentence embedder beside its model.

    Args:
        folder: The folder of the checkpoint.
        form: The pooling, and all else around the model.
        features: H, the features of the model's tokens.
    """
    kinds = _KNOWN if form.normalised else _KNOWN[:-1]
    modules = []
    for number, kind in enumerate(kinds):
        path = f"{number}_{kind}" if number else ""
        modules.append(
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"{_PACKAGE}models.{kind}",
            }
        )
    pooling = {"word_embedding_dimension": features} | {
        switch: pooling == form.pooling for pooling, switch in _POOLINGS.items()
    }
    texts = {"max_seq_length": form.max_tokens, "do_lower_case": form.lowercase}
    model = {
        "prompts": dict(form.prompts),
        "default_prompt_name": form.default_prompt,
        "similarity_fn_name": form.similarity,
    }
    (folder / "1_Pooling").mkdir()  # a normalisation has no settings
    write_json(folder / MODULES_FILE, modules)
    write_json(folder / "1_Pooling" / "config.json", pooling | {"include_prompt": True})
    write_json(folder / _TEXT_FILES[0], texts)
    write_json(folder / _MODEL_FILE, model)


def _read_modules(folder: Path) -> dict[str, Path]:
    """Returns the folder of each module by its kind."""
    file = folder / MODULES_FILE
    modules = read_list(file)
    kinds = [_kind_of(module, file) for module in modules]
    if kinds not in ([*_KNOWN[:2]], [*_KNOWN]):
        raise InputError(
            f"{file}: the modules are {', '.join(kinds) or 'none'}; expected Transformer and "
            "Pooling, and perhaps Normalize behind them"
        )
    folders = {}
    for kind, module in zip(kinds, modules, strict=True):
        path = module.get("path", "")
        if kind == "Transformer":
            if path not in ("", "."):
                raise InputError(
                    f"{file}: the Transformer is in {shorten(repr(path))}; expected the folder "
                    "itself (path ''): save the model again with sentence-transformers"
                )
            continue
        if not isinstance(path, str) or not _FOLDER.fullmatch(path):
            raise InputError(
                f"{file}: the path of {kind} is {shorten(repr(path))}; expected the name of a "
                "folder in the checkpoint's, such as 1_Pooling"
            )
        folders[kind] = folder / path
    return folders


def _kind_of(module: Any, file: Path) -> str:
    """Returns the last part of a module's type."""
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{file}: a module has no type; copy or download the file again")
    kind = name.rpartition(".")[2]
    if not name.startswith(_PACKAGE) or kind not in _KNOWN:
        raise InputError(
            f"{file}: the module {shorten(name)} is not supported, and code that a file names is "
            f"never run; supported are {', '.join(_KNOWN)} of sentence-transformers"
        )
    return kind


def _read_pooling(folder: Path, features: int | None) -> Pooling:
    """Returns the pooling."""
    file = folder / "config.json"
    fields = read_object(file)
    chosen = fields.get("pooling_mode")
    if chosen is None:
        chosen = [pooling for pooling, switch in _POOLINGS.items() if fields.get(switch) is True]
        chosen = chosen or ["mean"]  # as the library does
    names = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(names, list) or len(names) != 1 or names[0] not in get_args(Pooling):
        raise InputError(
            f"{file}: the pooling is {shorten(repr(chosen))}; supported is one of "
            f"{', '.join(get_args(Pooling))}"
        )
    size = fields.get("embedding_dimension", fields.get("word_embedding_dimension"))
    if features is not None and size is not None and size != features:
        raise InputError(
            f"{file}: embeddings have {shorten(repr(size))} features, the model's tokens "
            f"{features}; take both files from one model"
        )
    if fields.get("include_prompt", True) is not True:
        raise InputError(
            f"{file}: include_prompt is {shorten(repr(fields['include_prompt']))}; embeddings "
            "without the tokens of their prompt are not supported"
        )
    return names[0]


def _require_of_embedding(file: Path) -> None:
    """Refuses a normalisation of something else than the embedding."""
    fields = read_object_if_there(file)
    for field in ("module_input_name", "module_output_name"):
        if fields.get(field, "sentence_embedding") != "sentence_embedding":
            raise InputError(
                f"{file}: {field} is {shorten(repr(fields[field]))}; supported is "
                "'sentence_embedding'"
            )


def _read_texts(folder: Path) -> tuple[int | None, bool]:
    """Returns the tokens to which texts are cut, and True if they are put in lower case."""
    file = next((folder / name for name in _TEXT_FILES if (folder / name).is_file()), None)
    fields = {} if file is None else read_object(file)
    longest = fields.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise InputError(
            f"{file}: max_seq_length is {shorten(repr(longest))}; expected a number of tokens"
        )
    task = fields.get("transformer_task", "feature-extraction")
    output = fields.get("module_output_name", "token_embeddings")
    if task != "feature-extraction" or output != "token_embeddings":
        raise InputError(
            f"{file}: transformer_task is {shorten(repr(task))} and module_output_name "
            f"{shorten(repr(output))}; supported are 'feature-extraction' and 'token_embeddings'"
        )
    modalities = fields.get("modality_config", {"text": {}})
    of_text = modalities.get("text") if isinstance(modalities, Mapping) else None
    if not isinstance(of_text, Mapping) or (
        of_text.get("method", "forward"),
        of_text.get("method_output_name", "last_hidden_state"),
    ) != ("forward", "last_hidden_state"):
        raise InputError(
            f"{file}: modality_config is {shorten(repr(modalities))}; supported are texts, by the "
            "model's forward and its last_hidden_state"
        )
    return longest, fields.get("do_lower_case") is True


def _similarity(fields: Mapping[str, Any], file: Path) -> Similarity:
    """Returns the similarity of embeddings."""
    kind = fields.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise InputError(
            f"{file}: model_type is {shorten(repr(kind))}; supported is 'SentenceTransformer'"
        )
    similarity = fields.get("similarity_fn_name") or "cosine"
    if similarity not in get_args(Similarity):
        raise InputError(
            f"{file}: similarity_fn_name is {shorten(repr(similarity))}; supported are "
            f"{', '.join(get_args(Similarity))}"
        )
    return similarity


def _prompts(fields: Mapping[str, Any], file: Path) -> tuple[dict[str, str], str | None]:
    """Returns the named prompts, and the name of the one before each text."""
    prompts, default = fields.get("prompts") or {}, fields.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise InputError(f"{file}: prompts are {shorten(repr(prompts))}; expected texts by name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise InputError(
            f"{file}: default_prompt_name is {shorten(repr(default))}, which is none of prompts"
        )
    return {name: text or "" for name, text in prompts.items()}, default
