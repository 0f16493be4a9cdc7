"""Finding a checkpoint: a folder of this machine, or a download from the Hugging Face Hub."""

import re
from collections.abc import Iterable
from pathlib import Path

from adamerge_jax.checkpoints.nested import require_not_nested
from adamerge_jax.checkpoints.pipeline_index import (
    COPIED,
    PIPELINE_FILE,
    component_names,
    is_pipeline,
)
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object

_GGUF_ENDING = ".gguf"
"""The ending of files that hold a whole model."""

_SETTINGS = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.codes", "*.spm"),
    "README.md",  # has the licence
)

_VARIANTS = "*.*.safetensors"
"""Weights of a pipeline's component in another dtype than its usual files have."""

# Subfolders hold other formats of the same weights (onnx/, openvino/, ...), except for
# additional_chat_templates/ and the modules of a sentence embedder (1_Pooling/).
_IGNORED = ("[!a0-9]*/*", "[0-9][!_]*/*", "a[!d]*/*", "ad[!d]*/*")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint or an adapter, downloading it if it is on the Hub.

    A GGUF file is returned itself.

    The name of an existing folder is that folder; other names like `name` and `org/name` are Hub
    names. The conventions of the Hub's client hold: its cache, `HF_TOKEN`, `HF_HUB_OFFLINE`.

    Args:
        source: A folder, or a Hub name such as `google-bert/bert-base-uncased`.
        revision: A branch, tag or commit of a checkpoint on the Hub.

    Raises:
        InputError: There is no such folder, the model is in a subfolder of it, or the Hub refuses
            the download.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{source} is a local folder, so it has no revision {revision!r}; leave the "
                "revision out, or name a checkpoint of the Hub"
            )
        require_not_nested(folder)
        return folder
    if folder.suffix == _GGUF_ENDING and folder.is_file() and revision is None:
        return folder
    if folder.exists():
        raise InputError(f"{source} is a file; give the folder that the checkpoint is in")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        raise InputError(
            f"no such folder: {source}; give the folder of a checkpoint, or a Hub name such as "
            "org/name"
        )
    return _download(source, revision)


def _download(name: str, revision: str | None) -> Path:
    """Downloads the files of a Hub checkpoint that are needed, and no pickled ones."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at_revision = f" at revision {revision!r}" if revision else ""

    def download(wanted: Iterable[str], ignored: Iterable[str]) -> Path:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(ignored)
        )
        return Path(folder)

    try:
        folder = download(_SETTINGS, _IGNORED)
        if not is_pipeline(folder):
            return download(["*.safetensors"], _IGNORED)
        components = component_names(read_object(folder / PIPELINE_FILE), folder)
        files = [f"{part}/*{ending}" for part in components for ending in (*COPIED, ".safetensors")]
        download(files, [_VARIANTS])
        without_weights = [part for part in components if _lacks_weights(folder / part)]
        if without_weights:
            download([f"{part}/{_VARIANTS}" for part in without_weights], ())
        return folder
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the Hugging Face Hub: accept its terms at "
            f"https://huggingface.co/{name} and set HF_TOKEN to a token that may read it"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a local folder nor a checkpoint on the Hugging Face Hub; check "
            "the name, and set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} on the Hugging Face Hub has no revision {revision!r}; give one of its "
            "branches, tags or commits"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub is unreachable"
        raise InputError(
            f"{name}{at_revision} is neither a local folder nor in the Hub's cache "
            f"({constants.HF_HUB_CACHE}), and {reason}; download it while online, or give a folder"
        ) from error
    # The client also lets through whatever its transport, the disk and its own checks raise.
    except Exception as error:
        raise InputError(
            f"cannot download {name}{at_revision} from the Hugging Face Hub: {in_one_line(error)}"
        ) from error


def _lacks_weights(component: Path) -> bool:
    """Returns True for a folder of a model without weights."""
    return (component / "config.json").is_file() and not any(component.glob("*.safetensors"))
