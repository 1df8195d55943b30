"""A real crawl from the documentation on this machine."""
