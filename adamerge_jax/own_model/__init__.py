"""Merging in Python: models in memory by any `forward`, and recipes that are run or prepared."""
