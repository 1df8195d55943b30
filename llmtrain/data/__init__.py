"""The data plane: token store, mixture plan and batches."""
