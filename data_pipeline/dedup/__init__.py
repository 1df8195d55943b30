"""What stands in a corpus more than once: addresses, texts, lines, spans, near-duplicates."""
