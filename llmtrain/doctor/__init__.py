"""What a machine has, and what is in the way of a run on it."""
