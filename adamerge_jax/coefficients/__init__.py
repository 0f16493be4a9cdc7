"""The merge coefficients: the parameters that share one, the values allowed, their file."""
