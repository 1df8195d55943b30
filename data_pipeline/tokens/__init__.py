"""From clean documents to token stores."""
