"""Examples, the batches that are made of them, and what the experts predict for them."""
