"""The model: layers, the Transformer, its parameter table and its initialisation."""
