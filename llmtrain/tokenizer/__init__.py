"""Tokenizers: load, train and identify by hash."""
