"""The rounding of task vectors, which are differences of float32 numbers."""

SINGULAR_VALUE = 1e-5
"""Part of a matrix's largest singular value beneath which one is the rounding of its entries."""
