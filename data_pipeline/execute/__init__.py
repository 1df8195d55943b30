"""Where tasks run: worker processes on this machine, Ray, Slurm."""
