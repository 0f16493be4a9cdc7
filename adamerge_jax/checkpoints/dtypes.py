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

DELTA_DTYPES = DTYPES | {"int8": INT8}
"""NumPy dtypes of task vectors."""
