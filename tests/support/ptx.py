"""A few PTX instructions in numpy, so that inline assembly can be checked where no GPU is.

Semantics from NVIDIA's PTX ISA reference: ``prmt`` (default mode), packed half precision with one rounding to nearest
even, no flush to zero. Every register is a numpy array of uint32 (uint64
for addresses): one lane per element.
"""

from __future__ import annotations

import re

import numpy as np
import torch


def _halves(register: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """``[..., 2]`` float64: the packed numbers, lower one first."""
    parts = np.stack((register & 0xFFFF, register >> 16), axis=-1).astype(np.uint16).view(np.int16)
    return torch.from_numpy(parts).view(dtype).double()


def _pack(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Rounds float64 once. Two bfloat16 factors and an addend, or two float16 factors, are exact in float64."""
    parts = values.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return parts[..., 0] | (parts[..., 1] << 16)


def _prmt(first: np.ndarray, second: np.ndarray, selector: np.ndarray) -> np.ndarray:
    data = [(first >> (8 * i)) & 0xFF for i in range(4)] + [(second >> (8 * i)) & 0xFF for i in range(4)]
    chosen = int(selector.flat[0])
    nibbles = [(chosen >> (4 * i)) & 0xF for i in range(4)]
    assert all(nibble < 8 for nibble in nibbles), "the sign-replicating mode is not modelled"
    return sum(data[nibble] << (8 * i) for i, nibble in enumerate(nibbles)).astype(np.uint32)


def _float32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.uint32).view(np.float32)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "not.b32": lambda a: ~a,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * b.astype(np.uint64) + c.astype(np.uint64),
    "sub.rn.f32": lambda a, b: (_float32(a) - _float32(b)).view(np.uint32),
    "sub.rn.f16x2": lambda a, b: _pack(_halves(a, torch.float16) - _halves(b, torch.float16), torch.float16),
    "mul.rn.f16x2": lambda a, b: _pack(_halves(a, torch.float16) * _halves(b, torch.float16), torch.float16),
    "fma.rn.bf16x2": lambda a, b, c: _pack(
        _halves(a, torch.bfloat16) * _halves(b, torch.bfloat16) + _halves(c, torch.bfloat16), torch.bfloat16
    ),
}


def run(
    assembly: str, operands: dict[str, np.ndarray], table: np.ndarray | None = None, address: int = 0
) -> dict[str, np.ndarray]:
    """Runs a block of inline assembly.

    ``operands`` are its inputs by name ("$4"); ``table`` is float32 memory at ``address``, all that it may read.
    Returns all registers afterwards.
    """
    registers = dict(operands)
    shape = next(iter(registers.values())).shape
    declared: set[str] = set()

    def read(token: str) -> np.ndarray:
        if token in registers:
            return registers[token]
        number = int(token[2:], 16) if token.startswith("0f") else int(token, 0)
        return np.full(shape, number, dtype=np.uint32)

    for line in filter(None, (part.strip() for part in re.sub(r"[{}]", "", assembly).split(";"))):
        name, _, rest = line.partition(" ")
        tokens = [token.strip() for token in rest.replace(".b32 ", "").replace(".b64 ", "").split(",")]
        if name == ".reg":
            declared |= set(tokens)
            continue
        assert tokens[0].startswith("$") or tokens[0] in declared, f"{tokens[0]} is not declared"
        # bfloat16 and float16 instructions take registers only.
        immediate = any(token[0].isdigit() for token in tokens[1:])
        assert not (immediate and "x2" in name), f"{name} takes no immediate operand"
        if name == "ld.global.nc.f32":
            assert table is not None
            places, rest_bytes = np.divmod(registers[tokens[1].strip("[]")] - np.uint64(address), np.uint64(4))
            assert not rest_bytes.any() and places.max() < table.size, "reads outside of the table"
            registers[tokens[0]] = table.view(np.uint32)[places.astype(np.int64)]
            continue
        registers[tokens[0]] = OPERATIONS[name](*(read(token) for token in tokens[1:]))
    return registers
