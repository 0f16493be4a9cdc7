"""The example that comes with the package: four experts of handwritten digits, made and merged.

`prepare` trains a base and its experts on the package's digits, upright, rotated, inverted and
faint, and writes them into a folder with a recipe and data: images as arrays, `[N, 1, 16, 16]`.

Examples:
    >>> import adamerge_jax as am
    >>> list(am.quickstart.TASKS)
    ['upright', 'rotated', 'inverted', 'faint']
"""

from adamerge_jax.quickstart.experts import prepare, recipe_text
from adamerge_jax.quickstart.tasks import TASKS

__all__ = ["TASKS", "prepare", "recipe_text"]
