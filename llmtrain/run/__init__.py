"""A run: its folder, how far it is, the journal of its data."""
