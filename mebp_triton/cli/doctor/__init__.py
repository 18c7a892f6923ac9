"""What ``mebp doctor`` finds on this machine, and what it advises."""
