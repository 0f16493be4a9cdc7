"""Knowing what a merge costs before it starts: memory, time and disk, without reading a weight.

The merge's own learning step is built with abstract arrays, so sizes are exact. What it keeps in
between is asked of the compiler for the present device, and estimated from the step's trace for any
other.
"""

from adamerge_jax.plan.prediction import Plan, make_plan
from adamerge_jax.plan.table import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
