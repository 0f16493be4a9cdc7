from pathlib import Path

import pytest

from tests.bad_inputs.corpus import require_accepted, require_refused


@pytest.mark.parametrize("kind", ["recipes", "coefficients", "mergekit_files"])
def test_bad_inputs_are_refused(kind: str, suites: dict[str, Path], tmp_path: Path) -> None:
    require_refused(kind, suites, tmp_path)


@pytest.mark.parametrize("kind", ["coefficients", "mergekit_files"])
def test_what_they_are_made_of_is_accepted(
    kind: str, suites: dict[str, Path], tmp_path: Path
) -> None:
    require_accepted(kind, suites, tmp_path)
