"""What every test starts from: an empty Hugging Face cache, no network, the same random draws."""

import copy
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Read when `datasets` and `huggingface_hub` are imported, so set before any test is. The processes
# that share the tests share the caches too.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="adamerge_jax-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["HF_HOME"], "datasets")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["HF_HOME"], "cache")
# Many tests run the same tiny models: each is compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["HF_HOME"], "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Compiling took half of the time. These leave out what would make tiny programs faster.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
)
# One thread a process: two processes share the tests, and their arrays are too small for more.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest

# The modules of JAX, PyTorch and `transformers` are a million objects, and tracing makes many more:
# looking for garbage among all of them was an eighth of the time.
gc.disable()

# What the fixtures need is imported by them: the process that only hands out the tests loads no
# PyTorch for it.

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


# Modules that take a quarter of a minute or more each.
_LONG = {
    *("test_devices", "test_notebooks", "test_resuming", "test_presets"),
    *("test_run", "test_imports", "test_initial_merge", "test_plan", "test_adapters"),
    *("test_learning", "test_language_learning", "test_compare"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the longest modules: at the end one worker would wait for the other's."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session", autouse=True)
def written_by_the_system() -> Iterator[None]:
    """Leaves it to the system when files reach the disk: no test cuts the power.

    A file that is closed is still refused.
    """

    def fsync(file: int) -> None:
        os.fstat(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def drawn_figures() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Saves figures without drawing them, which would take a third of a tiny run.

    Yields a context in which figures are drawn.
    """
    from matplotlib.figure import Figure

    drawing = Figure.savefig

    def savefig(figure: Figure, file: Any, **options: Any) -> None:
        if isinstance(file, Path):
            file.touch()
        else:
            file.write(b"<svg/>")

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", drawing)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield drawn


@pytest.fixture(autouse=True)
def no_code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test allows is not allowed in the next."""
    monkeypatch.setattr("adamerge_jax.registry._ALLOWED", set())


@pytest.fixture(scope="session")
def text_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.references import save_text_merge

    return save_text_merge(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def image_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.references import save_image_merge

    return save_image_merge(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def clip_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.references import save_clip_merge

    return save_clip_merge(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def text_recipe(text_fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a BERT and three experts; a test may change it as it likes."""
    return copy.deepcopy(text_fields)


@pytest.fixture
def image_recipe(image_fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a ViT and two experts on NumPy files."""
    return copy.deepcopy(image_fields)


@pytest.fixture
def clip_recipe(clip_fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a CLIP and two vision-only experts on folders of images."""
    return copy.deepcopy(clip_fields)
