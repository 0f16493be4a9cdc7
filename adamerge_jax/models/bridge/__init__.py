"""Models without a family of their own: their own PyTorch forward, run as JAX by `torchax`.

Imports PyTorch, so it is imported only for a model that needs it.
"""
