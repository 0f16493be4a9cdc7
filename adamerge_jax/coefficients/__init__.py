"""Which parameters share a coefficient, which values it may take, the file that keeps it."""
