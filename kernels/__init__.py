"""Int4 weights and the operations on them: packed layout, kernels, plain-torch paths, torch.library ops.

Installed as ``mebp_triton.kernels``. It depends on torch and triton alone, and knows no modules, models or stores.
"""
