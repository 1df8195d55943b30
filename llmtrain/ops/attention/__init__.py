"""Attention inside documents: one signature, several backends, one choice."""
