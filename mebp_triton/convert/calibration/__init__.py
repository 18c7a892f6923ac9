"""What activations say about weights: a source is run block by block, for calibration and for its own loss."""

CALIBRATION_WINDOWS = 32  # of a text, unless asked otherwise
