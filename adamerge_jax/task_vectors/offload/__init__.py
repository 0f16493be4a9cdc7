"""Where task vectors lie while coefficients are learned."""
