"""Writers of what conversions make. A new format is a file in this folder."""
