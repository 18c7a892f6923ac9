"""Conversions: foreign checkpoints come in, models and stores go out."""
