"""Hydra configuration: one root per command, one folder per section."""
