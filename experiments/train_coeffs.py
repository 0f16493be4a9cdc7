"""Learn merge coefficients from a recipe: `python experiments/train_coeffs.py RECIPE.yaml`.

The launcher to start on an accelerator; the same job as `adamerge learn`. See `--help`.
"""

from adamerge_jax.cli.main import learn

if __name__ == "__main__":
    learn()
