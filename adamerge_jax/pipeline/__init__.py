"""The stages from a recipe to a checkpoint: one file each, in the order of the data."""
