"""The whole path on real data, without a network: `adamerge quickstart` from a checkout.

python experiments/quickstart.py [--out FOLDER] [--seed SEED]
"""

import sys

from adamerge_jax.cli.main import main
from adamerge_jax.quickstart import prepare

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    main(["quickstart", *sys.argv[1:]])
