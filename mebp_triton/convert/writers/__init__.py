"""What conversions write, a file for each format."""
