"""llmtrain: train LLaMA-style models on any layout, from one config, with exact resume."""
