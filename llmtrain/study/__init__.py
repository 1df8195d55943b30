"""Ready studies: what to train, what to fit to it, how well the fit foretells a held-out run."""
