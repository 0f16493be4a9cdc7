"""Dtypes by their names in a recipe."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtypes of weights."""

FLOAT32 = DTYPES["float32"]
INT8 = np.dtype(np.int8)

INT4 = np.dtype(ml_dtypes.int4)

INTEGERS = {"int8": INT8, "int4": INT4}
"""NumPy dtypes of task vectors that are rounded to multiples of steps."""

DELTA_DTYPES = DTYPES | INTEGERS
"""NumPy dtypes of task vectors."""
