"""The comparison of methods on one recipe's models and data.

A contender is one way to merge with one seed: a merge method, a preset, or the recipe's own
learning. Each is measured in a process of its own, so that its peak memory is its own, and its row
is kept in the output folder; a comparison that was killed goes on where it stopped.
"""
