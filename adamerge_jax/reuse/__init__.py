"""What learned coefficients are good for later: fold them again, start from them, compare them."""

from adamerge_jax.reuse.comparing import Comparison, compare
from adamerge_jax.reuse.folding import Fold, prepare_fold
from adamerge_jax.reuse.identities import other_contents
from adamerge_jax.reuse.starting import Start, begin, open_start, start_from_file

__all__ = [
    "Comparison",
    "Fold",
    "Start",
    "begin",
    "compare",
    "open_start",
    "other_contents",
    "prepare_fold",
    "start_from_file",
]
