"""The handwritten digits of the quickstart, which come with the package.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998; UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0,
as scikit-learn's `load_digits` gives them: 1,797 images of 8 x 8 pixels with values from 0 to 16.
`digits.npz` has them in four parts, drawn so that each part has all digits as often as the whole.
"""

from importlib.resources import files

import numpy as np
from jaxtyping import Float, Int

Images = Float[np.ndarray, "N height width"]
Labels = Int[np.ndarray, " N"]

PARTS = ("train", "calibration", "validation", "test")
"""Names of the parts: 897 images to train on, 250, 250, and 400."""

_LARGEST = 16


def load_digits() -> dict[str, tuple[Images, Labels]]:
    """Returns images with values from 0 to 1, and their digits, for each part by name."""
    resource = files("adamerge_jax.quickstart").joinpath("digits.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {
            part: (
                arrays[f"{part}_images"].astype(np.float32) / _LARGEST,
                arrays[f"{part}_labels"].astype(np.int32),
            )
            for part in PARTS
        }
