"""Takes the place of Triton's launcher: compiles as a launch would, and executes the PTX on CPU tensors.

with Emulator(87) as emulator:
    y = int4_matmul_triton(x, weight, config=config)
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .counts import Counts
from .faults import NotModelled
from .floats import Array
from .global_memory import GlobalMemory
from .machine import Machine
from .parser import Kernel, parse
from .state import State, all_blocks
from .tensors import arguments_of

# The least compute capability that Triton compiles for.
LEAST_TARGET = 75
# Threads that run at a time. More of them cost less each, until their registers outgrow the caches.
LANES = 8192
# Compiled kernels that a process keeps; with its instructions, one takes some MiB.
MOST_KEPT = 64
# Parameters that the compiler adds for scratch memory, which these kernels do not use.
MOST_ADDED = 2
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        ptx: as text; ``kernel`` has its instructions, ``cubin`` the machine code that ptxas makes of it, and
            ``warnings`` the lines in which ptxas warns of something.
        shared_bytes: of shared memory, which a launch asks for.
        tensor_memory: columns of tensor memory per block (sm_100 only).
        assemble: runs ptxas, and returns the machine code and its log. That takes a fifth of the time, and executing
            PTX does not need it.
    """

    ptx: str
    shared_bytes: int
    tensor_memory: int
    assemble: Callable[[str], tuple[bytes, str]]

    @functools.cached_property
    def kernel(self) -> Kernel:
        return parse(self.ptx)

    @property
    def code(self) -> str:
        """The PTX without the lines that name its version and its target: what targets of one family may share."""
        return re.sub(r"(?m)^\.(version|target) .*\n", "", self.ptx)

    @functools.cached_property
    def assembled(self) -> tuple[bytes, str]:
        """The machine code and the log of ptxas."""
        return self.assemble(self.ptx)

    @property
    def cubin(self) -> bytes:
        return self.assembled[0]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.assembled[1].splitlines() if re.search(r"\bwarning\b|\(C\d+\)", line)]


@dataclass(frozen=True)
class Launch:
    """One launch that was executed.

    Attributes:
        name: of the kernel's Python function.
        executed: instructions that have run, whatever the number of threads.
        compile_s, run_s: seconds.
        counts: of all blocks that ran, if counting was asked for.
    """

    name: str
    grid: Grid
    compiled: Compiled
    executed: int
    compile_s: float
    run_s: float
    counts: Counts | None


class Compiler:
    """Compiles kernels for one target, as launches would. A specialisation that was used lately is not compiled again.

    Raises:
        ValueError: there is no such target, or it is too old.
    """

    def __init__(self, target: int) -> None:
        if target < LEAST_TARGET:
            raise ValueError(f"target must be a compute capability from {LEAST_TARGET} on, such as 87, got {target}")
        self.target = GPUTarget("cuda", target, 32)
        self.backend = make_backend(self.target)
        self._binders: dict[JITFunction, Callable[..., Any]] = {}
        # The kernel that was used last comes last.
        self._compiled: dict[tuple[JITFunction, str], Compiled] = {}

    def compile(
        self, function: JITFunction, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Compiled, dict[str, Any], list[tuple[str, Any]]]:
        """Compiles what a launch with these arguments would. Tensors may be on the meta device.

        Returns:
            The kernel; all arguments by name; and those that are left when constants are gone, tuples taken apart.
        """
        if function not in self._binders:
            self._binders[function] = create_function_from_signature(function.signature, function.params, self.backend)
        bound, specialization, given = self._binders[function](*args, **kwargs)
        signature, constants, attributes, passed = self._specialize(bound, specialization)
        key = (function, f"{specialization} {sorted(given.items())}")
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            options = self.backend.parse_options(dict(kwargs))
            unknown = kwargs.keys() - vars(options).keys() - bound.keys()
            if unknown:
                raise KeyError(f"{function.__name__} has no parameter or option {sorted(unknown)}")
            source = ASTSource(function, signature, constants, attributes)
            with knobs.runtime.scope():
                knobs.runtime.add_stages_inspection_hook = without_ptxas
                made = triton.compile(source, target=self.target, options=vars(options))
            tensor_memory = getattr(made.metadata, "tmem_size", 0)
            assemble = functools.partial(self._assemble, options)
            compiled = Compiled(made.asm["ptx"], made.metadata.shared, tensor_memory, assemble)
        self._compiled[key] = compiled
        while len(self._compiled) > MOST_KEPT:
            del self._compiled[next(iter(self._compiled))]
        return compiled, bound, passed

    def _assemble(self, options: Any, ptx: str) -> tuple[bytes, str]:
        with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
            knobs.nvidia.dump_ptxas_log = True
            return self.backend.make_cubin(ptx, {}, options, self.target.arch), log.getvalue()

    def _specialize(self, bound: Mapping[str, Any], specialization: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Signature, constants and attributes as ``ASTSource`` takes them, and the arguments that are passed."""
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        passed: list[tuple[str, Any]] = []

        def visit(path: tuple[int, ...], name: str, kind: Any, attribute: Any, value: Any) -> None:
            if isinstance(kind, tuple):
                for index, part in enumerate(zip(kind, attribute, value, strict=True)):
                    visit((*path, index), f"{name}[{index}]", *part)
            elif kind == "constexpr":
                constants[path] = value
            else:
                passed.append((name, value))
                if isinstance(attribute, str):
                    attributes[path] = self.backend.parse_attr(attribute)

        for index, ((name, value), (kind, attribute)) in enumerate(zip(bound.items(), specialization, strict=True)):
            visit((index,), name, kind, attribute, value)
        signature = {name: kind for name, (kind, _) in zip(bound, specialization, strict=True)}
        return signature, constants, attributes, passed


def without_ptxas(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook on the stages of a compilation: makes no machine code of the PTX.

    Called without arguments, it names itself, so that Triton's cache keeps such compilations apart.
    """
    if stages is None:
        return "without ptxas", "without ptxas"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


@functools.cache
def compiler_for(target: int) -> Compiler:
    """Returns the process's one compiler for a compute capability, such as 87."""
    return Compiler(target)


class Emulator(AbstractContextManager["Emulator"]):
    """While active, launches of Triton kernels on CPU tensors are executed here, and appended to ``launches``.

    A launch raises ``faults.Fault`` if the kernel does what it must not do, and ``faults.NotModelled`` if it has an
    instruction that cannot be executed. Outputs are written back only when a launch has ended well.

    Args:
        target: compute capability to compile for, such as 87.
        count: whether to count instructions and accesses.
        blocks: the blocks to run of a grid, ``[n, 3]``; all of them by default. ``state.no_blocks`` only compiles.
        check: whether to look for races and uninitialised reads, which takes about half of the time.
        edit: changes the PTX of a kernel before it is executed: to see whether a planted error is found.
    """

    def __init__(
        self,
        target: int,
        count: bool = False,
        blocks: Callable[[Grid], Array] = all_blocks,
        check: bool = True,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        self.compiler = compiler_for(target)
        self.count, self.blocks, self.check, self.edit = count, blocks, check, edit
        self.launches: list[Launch] = []

    def __enter__(self) -> Emulator:
        if triton.knobs.runtime.interpret:
            raise ValueError("kernels of Triton's interpreter are not compiled: unset TRITON_INTERPRET")
        self._saved, launch = JITFunction.run, self.launch

        def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            launch(function, grid, args, kwargs)

        JITFunction.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._saved  # type: ignore[method-assign]

    def launch(self, function: JITFunction, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Executes one launch: ``function[grid](*args, **kwargs)``."""
        start = time.perf_counter()
        compiled, bound, passed = self.compiler.compile(function, args, kwargs)
        if self.edit is not None:
            compiled = replace(compiled, ptx=self.edit(compiled.ptx))
        compiled_at = time.perf_counter()
        x, y, z = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
        memory, params = arguments_of(passed)
        added = len(compiled.kernel.params) - len(params)
        if not 0 <= added <= MOST_ADDED:
            raise NotModelled(f"{function.__name__} takes {len(compiled.kernel.params)} parameters, not {len(params)}")
        executed, counts = self._run(compiled, (x, y, z), params + [0] * added, memory)
        memory.fetch()
        times = compiled_at - start, time.perf_counter() - compiled_at
        self.launches.append(Launch(function.__name__, (x, y, z), compiled, executed, *times, counts))

    def _run(
        self, compiled: Compiled, grid: Grid, params: Sequence[int], memory: GlobalMemory
    ) -> tuple[int, Counts | None]:
        """Runs the blocks, some at a time: each set starts with what the ones before it have written."""
        kernel, blocks = compiled.kernel, self.blocks(grid)
        each = max(1, LANES // max(1, kernel.threads))
        executed, total = 0, None
        for first in range(0, len(blocks), each):
            part = blocks[first : first + each]
            counts = Counts(kernel, len(part)) if self.count else None
            machine = Machine(State(kernel, grid, params, memory, compiled.shared_bytes, part, counts, self.check))
            machine.run()
            executed += machine.executed
            if total is None:
                total = counts
            elif counts is not None:
                total.add(counts)
        return executed, total
