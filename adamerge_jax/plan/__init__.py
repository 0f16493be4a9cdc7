"""The cost of a merge before it starts: memory, time and disk, without reading a weight.

The learning step of the merge is built with abstract arrays, so sizes are exact. The size of
activations comes from the compiler for the present device, and from the step's trace for any other.
"""

from adamerge_jax.plan.automatic import pick_fields
from adamerge_jax.plan.prediction import Plan, make_plan
from adamerge_jax.plan.table import print_plan

__all__ = ["Plan", "make_plan", "pick_fields", "print_plan"]
