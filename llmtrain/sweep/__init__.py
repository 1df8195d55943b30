"""Many runs of one command line: points of a sweep, the processes that train them, the outcome."""
