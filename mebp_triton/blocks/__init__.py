"""MeBP and LCSB: a model's blocks run one at a time, and a selection says which of them get a gradient."""
