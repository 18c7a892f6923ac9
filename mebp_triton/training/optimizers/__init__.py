"""Optimizers, a file each, and the learning-rate schedules."""
