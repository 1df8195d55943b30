"""Checkpoints: what is saved, where the copies are, and how a run goes on from them."""
