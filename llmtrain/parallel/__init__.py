"""Parallelism applied to a plain model, in one visible order."""
