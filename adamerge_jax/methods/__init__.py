"""Merges with nothing to learn, as scales for `mix`: what a learned merge is compared with."""

from adamerge_jax.methods.task_arithmetic import average, task_arithmetic

__all__ = ["average", "task_arithmetic"]
