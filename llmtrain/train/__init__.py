"""The training loop and what it observes, saves and logs."""
