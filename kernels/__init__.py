"""Int4 weights and the operations on them: packed layout, kernels, plain-torch paths, torch.library ops.

Installed as ``mebp_triton.kernels``. Knows torch and triton; knows nothing of modules, models or files.
"""
