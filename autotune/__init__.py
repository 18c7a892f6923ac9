"""Kernel configurations, judged by compiling and by measuring.

Installed as ``mebp_triton.autotune``. Knows the kernels; knows nothing of training.
"""
