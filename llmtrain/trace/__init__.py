"""``llmtrain trace``: from a step to its documents, and from a document to the steps it was in."""
