"""Merging of models that are pytrees in memory, by any `forward`: `merge` and `fold`."""
