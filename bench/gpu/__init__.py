"""The parts of ``bench/gpu_suite.py``."""
