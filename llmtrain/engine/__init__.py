"""Engines: one optimizer step on one global batch, whatever the layout."""
