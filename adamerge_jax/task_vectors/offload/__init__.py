"""The places where task vectors lie while coefficients are learned."""
