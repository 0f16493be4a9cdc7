"""A run folder: what its files are called, its record, its progress, going on with it."""
