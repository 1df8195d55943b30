"""Triton kernels behind ``llmtrain.ops.kernels``; imported only where they were chosen."""
