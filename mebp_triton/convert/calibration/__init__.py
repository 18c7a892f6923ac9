"""What activations say about weights: a source is run block by block, for calibration and for its own loss."""

CALIBRATION_WINDOWS = 64  # of a text, unless asked otherwise
