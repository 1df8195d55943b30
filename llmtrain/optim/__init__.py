"""The update rules and the learning rate."""
