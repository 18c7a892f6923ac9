"""Runs a source block by block on a text: to round its weights by what they read, and for its own loss."""

CALIBRATION_WINDOWS = 32  # windows of a text that are used, unless asked otherwise
