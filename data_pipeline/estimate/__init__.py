"""A dry run: the real pipeline over nested samples, and what it says of the whole."""
