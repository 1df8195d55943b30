"""How fast a machine trains a model, by part, beside what the machine can do."""
