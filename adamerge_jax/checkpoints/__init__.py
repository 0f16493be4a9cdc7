"""Checkpoints and adapters, in and out: one file a format."""
