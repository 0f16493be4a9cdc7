from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the suites by name."""
    from tests.bad_inputs.suites import save_images, save_language, save_text

    folders = {}
    for name, save in {"text": save_text, "language": save_language, "images": save_images}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(folders[name])
    return folders
