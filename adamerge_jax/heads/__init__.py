"""Heads: what each task keeps for itself, and how it is fitted to the merged features."""
