"""Held-out evaluation and generation."""
