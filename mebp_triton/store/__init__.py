"""Files behind tensors: weights, activation checkpoints, optimizer state."""
