"""The guide's granularity and objective of one's own, in a whole run."""

from pathlib import Path

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from tests.references import write_recipe

ROOT = Path(__file__).parents[2]


def test_the_guide_shows_the_file():
    code = (ROOT / "experiments" / "custom.py").read_text()
    shown = code.split('"""\n', 1)[1].strip()
    assert shown in (ROOT / "docs/guides/custom.md").read_text()


def test_a_run_with_both(text_recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    recipe = write_recipe(tmp_path, text_recipe)
    run = tmp_path / "run"
    chosen = ["--coefficients.granularity", "custom:by_kind"]
    chosen += ["--objectives", "[{name: custom:confidence}]"]
    cli.main(["learn", str(recipe), "--out", str(run), "--allow-code", *chosen])
    coefficients = Coefficients.load(run / "coefficients.safetensors")
    assert coefficients.granularity == "custom:by_kind"
    assert coefficients.values.keys() == {"attention", "others"}
    assert coefficients.objective == "custom:confidence"
    # Folding finds the granularity again.
    file, folded = run / "coefficients.safetensors", tmp_path / "folded"
    cli.main(["fold", str(recipe), str(file), "--out", str(folded), "--allow-code", *chosen])
    first = (run / "checkpoint" / "model.safetensors").read_bytes()
    assert (folded / "checkpoint" / "model.safetensors").read_bytes() == first
