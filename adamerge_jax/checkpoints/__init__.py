"""Checkpoint formats, one file each: Hugging Face in and out, Orbax in and out."""
