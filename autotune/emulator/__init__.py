"""A functional emulator of PTX in numpy: executes what Triton compiles for NVIDIA GPUs, on a machine without one.

``driver.Emulator`` takes the place of Triton's launcher. It compiles a kernel as a launch would and executes the PTX on
CPU tensors: bfloat16, inline assembly, matrix instructions, swizzled shared memory and asynchronous copies included.
Wrong accesses and races are faults that name the instruction. An instruction that is not modelled is an error as well.

Not modelled: timing, the machine code that ptxas makes of the PTX, how a tensor core rounds its sums, TMA, mbarriers,
clusters, tensor memory (sm_100), atomics, local memory and device functions. ``ex2``, ``lg2``, ``rcp`` and ``div`` give
numpy's results, where a GPU may be off by a unit or two in the last place.
"""
