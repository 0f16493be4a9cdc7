"""The `adamerge` command as `python -m adamerge_jax`."""

from adamerge_jax.cli.main import main

main()
