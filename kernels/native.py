"""Products and decoding of packed weights by compiled C code, on processors for which it was built.

``pip install`` compiles ``native/*.c`` where there is a C compiler with OpenMP. Without it, or with the environment
variable ``MEBP_TRITON_NATIVE=off``, ``panel`` does the same in plain torch. A smaller instruction set than the
processor's can be named there: ``MEBP_TRITON_NATIVE=avx2``.

The code runs in the threads of the OpenMP library that torch has loaded, by one parallel region for a product. Results
do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .layout import Int4Weight
from .workspace import is_traced, workspace

# As ``job.h`` and ``entry.c`` number them.
MULTIPLY, MULTIPLY_DX, DECODE = range(3)
INSTRUCTIONS = ("off", "neon", "avx2", "avx512")
MODES = {("symmetric", 4): 0, ("affine", 4): 1, ("codebook", 4): 2, ("symmetric", 8): 3, ("affine", 8): 4}
SCALES = {torch.float16: 0, torch.float32: 1, torch.int8: 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications that are worth a second thread, of few tokens and of more: between the products of a token, which come
# with pauses, a waiting thread falls asleep, and waking it takes tens of microseconds.
LEAST_SHARED_FEW, LEAST_SHARED = 1 << 20, 1 << 18
VARIABLE = "MEBP_TRITON_NATIVE"
FEW_TOKENS = 32  # so few that a panel would be decoded for little work


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec(f"{__package__}._native")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)  # torch has loaded its OpenMP library, which this one then uses
    except OSError:  # built on another system
        return None
    for name in ("best", "scratch", "run", "rows", "multiplies_bfloat16"):
        getattr(library, f"mebp_{name}").restype = ctypes.c_int64
    library.mebp_scratch.argtypes = [ctypes.c_int64] * 5
    library.mebp_run.argtypes = library.mebp_rows.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return library


class _Choice:
    """The instruction set in use: an index of INSTRUCTIONS, 0 for none."""

    def __init__(self) -> None:
        self.best = self._best()
        self.used = self._wanted()

    @staticmethod
    def _best() -> int:
        library = _library()
        return 0 if library is None else library.mebp_best()

    def _wanted(self) -> int:
        name = os.environ.get(VARIABLE, "")
        if name and name not in INSTRUCTIONS:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(INSTRUCTIONS)}, got {name!r}")
        if name and name not in self.names():
            raise ValueError(
                f"{VARIABLE}={name} is not available here, only {', '.join(self.names())}: name one or unset it"
            )
        return INSTRUCTIONS.index(name) if name else self.best

    def names(self) -> list[str]:
        """The instruction sets that run here, "off" first."""
        best = INSTRUCTIONS[self.best]
        return [name for name in INSTRUCTIONS if name in ("off", best) or (name, best) == ("avx2", "avx512")]


@functools.cache
def _choice() -> _Choice:
    return _Choice()


def instructions() -> str | None:
    """The instruction set by which products run: "avx512", "avx2" or "neon"; None if torch computes them."""
    used = _choice().used
    return INSTRUCTIONS[used] if used else None


def available() -> list[str]:
    """All names that ``using`` takes here, "off" first."""
    return _choice().names()


def described() -> str:
    """The instruction set in use, or why there is none, in words."""
    if _library() is None:
        return "none: the package was installed where no C compiler with OpenMP was found"
    choice = _choice()
    if not choice.best:
        return "none: this processor has neither AVX2 with FMA nor NEON"
    if not choice.used:
        return f"off, as {VARIABLE} says"
    return INSTRUCTIONS[choice.used]


@contextmanager
def using(name: str) -> Iterator[None]:
    """While active, products run by the instruction set ``name``, or in plain torch with "off".

    Raises:
        ValueError: this machine does not have it, or no code was compiled for it.
    """
    if name not in available():
        raise ValueError(f"instruction set {name!r} is not available here, only {', '.join(available())}")
    choice = _choice()
    before, choice.used = choice.used, INSTRUCTIONS.index(name)
    try:
        yield
    finally:
        choice.used = before


@functools.cache
def _is_torch_faster_in(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` faster than compiled code does in float32.

    It follows from the processor alone and is not timed, so that a run gives the same bits again.
    """
    library = _library()
    return dtype == torch.bfloat16 and library is not None and bool(library.mebp_multiplies_bfloat16())


def takes(x: Tensor) -> bool:
    """Whether compiled code computes products with ``x`` ``[M, K]``: there is some, and torch's are not faster.

    It multiplies in float32. In 16 bits, torch's products of a decoded panel may be faster, but not for few tokens.
    """
    if not _choice().used or x.device.type != "cpu":
        return False
    if x.dtype == torch.float32:
        return True
    return x.dtype in DTYPES and (x.shape[0] <= FEW_TOKENS or not _is_torch_faster_in(x.dtype))


def decodes(weight: Int4Weight, dtype: torch.dtype) -> bool:
    """Whether compiled code decodes this weight to ``dtype``."""
    return bool(_choice().used) and weight.device.type == "cpu" and dtype in DTYPES


_HEADER = struct.Struct("15q")  # a Job of job.h up to its weights
_CALL = struct.Struct("8q")  # the part of a Weight that every call brings anew


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _along_rows(tensor: Tensor | None) -> tuple[int, int]:
    """Address and stride of a matrix whose rows are contiguous."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, or a copy."""
    tensor = tensor.resolve_neg()  # a view may say that its numbers are those in memory with the sign turned
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _operand(tensor: Tensor) -> bytes:
    """Packs the part of a Weight that a call brings, where it has an operand alone and neither bias nor LoRA."""
    return _CALL.pack(tensor.data_ptr(), tensor.stride(0), 0, 0, 0, 0, 0, 0)


def _form(weight: Int4Weight) -> bytes:
    """Packs the part of a Weight that stays, and keeps it with the weight while its tensors stay where they are."""
    kept = weight.__dict__.get("native_form")
    if kept is not None:
        tensors, places, numbers = kept
        if [tensor.data_ptr() for tensor in tensors] == places:
            return numbers
    given = (weight.packed, weight.scales, weight.minimum, weight.super_scales, weight.super_minimum)
    tensors = [tensor for tensor in (*given, weight.codebook) if tensor is not None]
    numbers = struct.pack(
        "15q",
        *(number for tensor in given for number in _along_rows(tensor)),
        _address(weight.codebook),
        SCALES[weight.scales.dtype],
        MODES[weight.scheme, weight.bits],
        weight.group_size,
        weight.out_features,
    )
    weight.__dict__["native_form"] = tensors, [tensor.data_ptr() for tensor in tensors], numbers
    return numbers


@functools.lru_cache(maxsize=4096)
def _scratch_size(operation: int, m: int, columns: int, ranks: int, threads: int) -> int:
    library = _library()
    assert library is not None
    return library.mebp_scratch(operation, m, columns, ranks, threads)


def _run(
    operation: int,
    operand: Tensor,
    columns: int,
    weights: Sequence[bytes],
    rows: int,
    ranks: int = 0,
    accumulate: bool = False,
    low: tuple[Tensor | None, Tensor | None] = (None, None),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Does a job with ``weights`` of ``rows`` rows in all. A trace without data takes the scratch memory only."""
    m = operand.shape[0]
    multiplications = (1 if operation == DECODE else m) * rows * columns
    least = LEAST_SHARED if operation == DECODE or m > FEW_TOKENS else LEAST_SHARED_FEW
    threads = torch.get_num_threads() if multiplications >= least else 1
    size = _scratch_size(operation, m, columns, ranks, threads)
    scratch = workspace().buffer("native", size, torch.float32, operand.device)
    if not weights or not operand.numel():
        return
    g, a = low
    library, used = _library(), _choice().used
    assert library is not None
    header = _HEADER.pack(
        operation,
        operand.data_ptr(),
        operand.stride(0),
        m,
        columns,
        threads,
        scratch.data_ptr(),
        accumulate,
        *_along_rows(g),
        *_along_rows(a),
        0 if a is None else a.shape[0],
        DTYPES[dtype],
        len(weights),
    )
    if library.mebp_run(b"".join((header, *weights)), used):
        raise RuntimeError(f"no code was compiled for the instruction set {INSTRUCTIONS[used]}")


Member = tuple[Int4Weight, Tensor | None, Tensor | None, Tensor | None]


def native_matmul(x: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """Computes ``Y_i = X·W_iᵀ + bias_i + t_i·b_iᵀ``, all in one parallel region.

    Args:
        x: ``[M, K]`` float32 on the CPU, like all other tensors.
        members: ``W_i[N_i, K]``, bias ``[N_i]``, t ``[M, R]`` and b ``[N_i, R]``; all but the weights may be None.

    Returns:
        ``[M, N_i]`` each.
    """
    m, columns = x.shape
    x, traced = _plain(x), is_traced(x)
    ys, weights, kept, rows, ranks = [], [], [], 0, 0
    for weight, bias, t, b in members:
        n, rank = weight.packed.shape[0], 0
        y = x.new_empty(m, n)
        ys.append(y)
        rows += n
        if t is not None and b is not None:
            t, b, rank = _plain(t), _plain(b), b.shape[1]
            ranks += rank
            kept += t, b  # copies live until the job is done
        if bias is not None:
            bias = _plain(bias)
            kept.append(bias)
        if not traced:
            weights.append(
                _form(weight) + _CALL.pack(y.data_ptr(), n, _address(bias), *_along_rows(t), *_along_rows(b), rank)
            )
    _run(MULTIPLY, x, columns, weights, rows, ranks)
    return ys


def native_matmul_dx(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None = None,
    a: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Computes ``dX = sum dY_i·W_i + g·a`` for weights of one K, in one parallel region.

    Args:
        dys: ``[M, N_i]`` each, float32 on the CPU, like all other tensors. weights: ``[N_i, K]``.
        g: ``[M, R]``. a: ``[R, K]``.
        into: ``[M, K]``, contiguous; dX is added to it.

    Returns:
        ``[M, K]``: ``into`` if it was given.
    """
    columns = weights[0].in_features
    dx = dys[0].new_empty(dys[0].shape[0], columns) if into is None else into
    dys, rows, traced = [_plain(dy) for dy in dys], sum(weight.out_features for weight in weights), is_traced(dx)
    low = None if g is None else _plain(g), None if a is None else _plain(a)
    forms = [] if traced else [_form(weight) + _operand(dy) for weight, dy in zip(weights, dys, strict=True)]
    _run(MULTIPLY_DX, dx, columns, forms, rows, accumulate=into is not None, low=low)
    return dx


def native_decode(weight: Int4Weight, out: Tensor) -> Tensor:
    """Decodes a weight ``[N, K]`` into ``out`` ``[N, K]``, whose rows are contiguous and whose dtype ``decodes`` takes.

    Every value is the one that plain torch decodes, bit for bit.
    """
    forms = [] if is_traced(out) else [_form(weight) + _operand(out)]
    _run(DECODE, out, weight.in_features, forms, weight.out_features, dtype=out.dtype)
    return out


def run_rows(numbers: bytes) -> None:
    """Does a small operation, a ``RowJob`` of ``job.h``."""
    used, library = _choice().used, _library()
    assert library is not None
    if library.mebp_rows(numbers, used):
        raise RuntimeError(f"no code was compiled for the instruction set {INSTRUCTIONS[used]}")
