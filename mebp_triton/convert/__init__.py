"""Foreign checkpoints in, models and stores out: readers, writers, quantizing and merging."""
