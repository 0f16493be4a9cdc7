"""From a recipe to a checkpoint: a file a stage, in the order of the data."""
