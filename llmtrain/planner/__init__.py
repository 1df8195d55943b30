"""What a configuration costs: arithmetic from the config alone, without torch."""
