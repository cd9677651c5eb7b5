"""Training: the loop over the DeepSpeed engine and its checkpoints."""
