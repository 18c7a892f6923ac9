"""Compiles a kernel without a GPU and reports registers, spills, shared memory and the main loop's instructions.

A kernel is compiled for a named target exactly as a launch would compile it. Too much shared memory is no compile
error, so a report compares it with the target's limit. These limits serve analysis only; a launch meets the device's
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from mebp_triton.kernels import embedding, matmul, matmul_dx
from mebp_triton.kernels.configs import KERNELS, Problem, TileConfig
from mebp_triton.kernels.layout import Int4Weight, tensor_shapes
from mebp_triton.kernels.names import Form

from .emulator.driver import compiler_for
from .sass import LoopCounts, count, cuobjdump, disassemble, main_loops

# Bytes of shared memory that one block may ask for (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {
    75: 65_536,
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}

# Columns of sm_100's tensor memory, in which its matrix instructions keep sums.
TENSOR_MEMORY_LIMIT = 512


@dataclass(frozen=True)
class StaticReport:
    """Facts about one kernel, compiled for one target.

    Attributes:
        kernel: the kernel's name.
        target_sm: the target's compute capability, such as 87.
        registers: registers per thread.
        spill_bytes: bytes per thread that did not fit into registers (the stack frame).
        shared_bytes: shared memory per block.
        shared_limit: shared memory that a block may ask for on that target.
        tensor_memory: columns of tensor memory per block (sm_100 only).
        loop: one trip of the main loop, the longest of several; None if no loop has matrix instructions.
        conversions: conversions from integer to float in all loops with matrix instructions.
        warnings: what ptxas warns of.
        unpacking_per_weight: integer instructions that unpack, per weight of a tile; None without a main loop. If it is
            more than one decoding takes, several warps decode the same weight.
    """

    kernel: str
    target_sm: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_memory: int = 0
    loop: LoopCounts | None = None
    conversions: int = 0
    warnings: tuple[str, ...] = ()
    unpacking_per_weight: float | None = None

    @property
    def fits(self) -> bool:
        """Whether a device of that target would accept a launch."""
        return self.shared_bytes <= self.shared_limit and self.tensor_memory <= TENSOR_MEMORY_LIMIT


def resource_usage(cubin: bytes) -> dict[str, int]:
    """The resources of the one kernel in a cubin, as ``cuobjdump`` names them: REG, STACK, SHARED, LOCAL, ..."""
    dump = cuobjdump(cubin, "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    if not {"REG", "STACK"} <= usage.keys():
        raise RuntimeError(f"cuobjdump gave no resource usage:\n{dump}")
    return usage


def compile_for(
    kernel: JITFunction, arguments: Mapping[str, Any], target_sm: int, options: Mapping[str, Any]
) -> StaticReport:
    """Compiles a kernel for a GPU that need not be there.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: all of the launch's arguments by name; tensors may be on the meta device.
        target_sm: compute capability, one of ``SHARED_LIMITS``.
        options: the launch's options: ``num_warps``, ``num_stages``, ...

    Raises:
        ValueError: the target is unknown, or the kernel belongs to Triton's interpreter.
    """
    if target_sm not in SHARED_LIMITS:
        raise ValueError(f"target_sm must be one of {sorted(SHARED_LIMITS)}, got {target_sm}")
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"kernel must be a JIT function, got {type(kernel).__name__}; unset TRITON_INTERPRET")
    compiled, _, _ = compiler_for(target_sm).compile(kernel, (), {**arguments, **options})
    usage = resource_usage(compiled.cubin)
    loops = [count(loop) for loop in main_loops(disassemble(compiled.cubin))]
    return StaticReport(
        kernel=kernel.__name__,
        target_sm=target_sm,
        registers=usage["REG"],
        spill_bytes=usage["STACK"],
        shared_bytes=compiled.shared_bytes,
        shared_limit=SHARED_LIMITS[target_sm],
        tensor_memory=compiled.tensor_memory,
        loop=max(loops, key=lambda loop: loop.issue_slots, default=None),
        conversions=sum(loop.conversions for loop in loops),
        warnings=tuple(compiled.warnings),
    )


def blank_weight(n: int, k: int, form: Form, scale_dtype: torch.dtype, device: str = "meta") -> Int4Weight:
    """A weight of these shapes, all zeros; on the meta device it takes no memory. ``scale_dtype``: see ``report``."""
    shapes = tensor_shapes(n, k, form, scale_dtype)
    parts = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}
    return Int4Weight(in_features=k, group_size=form.group_size, **parts)


def blank_launch(
    problem: Problem,
    config: TileConfig,
    rank: int = 16,
    bias: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    members: int = 1,
    device: str = "meta",
) -> tuple[JITFunction, dict[str, Any]]:
    """A kernel, and all arguments of a launch of it by name; the tensors are zeros.

    Args and errors are those of ``report``; ``device`` is the tensors'.
    """
    m, n, k = problem.m, problem.n, problem.k
    if problem.kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {problem.kernel!r}")
    if not config.suits(problem):
        raise ValueError(f"config must suit the problem, got {config} for {problem}")
    weight = blank_weight(n, k, problem.form, scale_dtype, device)
    weights = [weight] * members

    def zeros(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    out_dtype = problem.dtype if config.split == 1 else torch.float32
    parts = config.split
    if problem.kernel == "matmul":
        outs = n * members
        t, b = (zeros(m, rank * members), zeros(outs, rank)) if rank else (None, None)
        x, ys = zeros(m, k), [zeros(parts * m, n, dtype=out_dtype)] * members
        biases = zeros(outs) if bias else None
        return matmul._matmul_kernel, matmul.matmul_arguments(x, weights, biases, t, b, ys, config)
    if problem.kernel == "matmul_dx":
        g, a = (zeros(m, rank * members), zeros(rank * members, k)) if rank else (None, None)
        dys, dx = [zeros(m, n)] * members, zeros(parts * m, k, dtype=out_dtype)
        return matmul_dx._matmul_dx_kernel, matmul_dx.matmul_dx_arguments(dys, weights, g, a, dx, config)
    ids = torch.zeros(m, dtype=torch.int64, device=device)
    return embedding._embedding_kernel, embedding.embedding_arguments(ids, weight, zeros(m, k), config)


def report(
    problem: Problem,
    config: TileConfig,
    target_sm: int,
    rank: int = 16,
    bias: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    members: int = 1,
) -> StaticReport:
    """Compiles one of our kernels.

    Args:
        problem: the kernel and its sizes. Of the sizes only what a launch specialises on matters: whether 16 and
            ``block_k`` divide them, and whether one is 1.
        config: tile sizes.
        target_sm: compute capability.
        rank: the LoRA term's rank; 0 for none. The embedding has none.
        bias: whether there is a bias (``matmul`` only).
        scale_dtype: dtype of the weight's scales; int8 for scales of two levels.
        members: number of weights in the launch, each as the problem describes it.

    Raises:
        ValueError: the kernel or the target is unknown, or the configuration does not suit the problem.
    """
    function, arguments = blank_launch(problem, config, rank, bias, scale_dtype, members)
    static = compile_for(function, arguments, target_sm, config.launch_options())
    if static.loop is None:
        return static
    decoded = config.block_n * config.block_k / (32 * config.num_warps)
    return replace(static, unpacking_per_weight=static.loop.unpacking / decoded)
