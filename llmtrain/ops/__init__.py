"""Pure tensor operations: attention, rotary embedding, losses. No process groups."""
