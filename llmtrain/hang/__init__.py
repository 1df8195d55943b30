"""Who holds a run up: a heartbeat of every rank, and a process beside them that reads it."""
