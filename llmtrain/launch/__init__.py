"""From one training command line to processes on this machine or on a cluster."""
