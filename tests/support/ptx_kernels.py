"""Small kernels in PTX, executed by the emulator."""

from __future__ import annotations

import numpy as np

from mebp_triton.autotune.emulator.counts import Counts
from mebp_triton.autotune.emulator.global_memory import GlobalMemory
from mebp_triton.autotune.emulator.machine import Machine
from mebp_triton.autotune.emulator.parser import Instruction, parse
from mebp_triton.autotune.emulator.state import State

# %r1: the thread. %r2: its offset in shared memory, four bytes each. %r3: shared memory's start. %r4: both.
# %rd1: the buffer. %rd3: four bytes of it for each thread of each block. %r20: the block.
HEAD = """.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<99>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<19>;
	ld.param.b64 %rd1, [k_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r20, %ctaid.x;
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
	mad.lo.s32 %r22, %r20, {bytes}, %r2;
	cvt.u64.u32 %rd2, %r22;
	add.s64 %rd3, %rd1, %rd2;
"""
TAIL = "\tret;\n}\n"


def kernel_of(body: str, threads: int = 64):
    """The parsed kernel of a body."""
    return parse(HEAD.format(threads=threads, bytes=4 * threads) + body + TAIL)


def run(
    body: str,
    blocks: int = 3,
    threads: int = 64,
    shared: int = 1024,
    given: np.ndarray | None = None,
    counts: list[Counts] | None = None,
) -> np.ndarray:
    """Executes a body; what it costs is appended to ``counts``.

    Returns the buffer, uint32 ``[blocks, words]``, which starts as ``given`` or as zeros.
    """
    data = np.zeros((blocks, threads), dtype=np.uint32) if given is None else given.copy()
    flat = data.reshape(-1).view(np.uint8)
    memory = GlobalMemory()
    buffer = memory.add("out", flat, np.ones(len(flat), dtype=bool))
    memory.ready()
    kernel = kernel_of(body, threads)
    if counts is not None:
        counts.append(Counts(kernel, blocks))
    state = State(kernel, (blocks, 1, 1), [buffer.address], memory, shared, counts=counts[-1] if counts else None)
    Machine(state).run()
    memory.fetch()
    return data


def instruction(name: str) -> Instruction:
    """An instruction without operands, of which only the name matters."""
    return Instruction(name, [], None, 1, "test.py:1", name)
