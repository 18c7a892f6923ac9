"""The choice of kernel configurations, by compiling them and by measuring them.

Installed as ``mebp_triton.autotune``. It depends on the kernels alone, and knows nothing of training.
"""
