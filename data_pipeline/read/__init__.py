"""Raw inputs to documents: what an input means, how its bytes are read, what text they hold."""
