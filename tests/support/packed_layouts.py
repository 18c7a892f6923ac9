"""The packed layouts of other tools, written down by hand: each gives a module's tensors and the weight they mean."""

from __future__ import annotations

import numpy as np
import torch
from packed_models import bit_fields, drawn, int32, seed_of

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def gptq(group_size=32, symmetric=False, version=1, bits=4, act_order=False, g_idx=True, of=None):
    """The layout; ``of`` gives the bits of a module."""

    def layout(module, rows, columns):
        width = bits if of is None else of(module)
        matrix = drawn(module, rows, columns, group_size, symmetric, width, act_order)
        zeros = bit_fields(matrix.zeros, width)
        if version == 1 and width == 3:  # whose fields cross words
            zeros = bit_fields((matrix.zeros - 1) % 8, width)
        elif version == 1:  # as GPTQModel does, with a borrow below a zero of 0
            zeros = zeros - np.uint32(ONES[width])
        parts = {
            "qweight": int32(bit_fields(matrix.codes, width).T),
            "qzeros": int32(zeros),
            "scales": torch.from_numpy(matrix.scales),
        }
        parts |= {"g_idx": torch.from_numpy(matrix.groups.astype(np.int32))} if g_idx else {}
        return parts, matrix.weight()

    return layout


def awq_words(codes):
    """``[..., N]`` codes as int32 ``[..., N / 8]``: the nibbles of a word are outputs 0 2 4 6 1 3 5 7 of eight."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint64)
    words = sum(eight[..., output] << np.uint64(4 * place) for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return int32(words.astype(np.uint32))


def awq(group_size=32, symmetric=False, dtype=torch.float16):
    def layout(module, rows, columns):
        matrix = drawn(module, rows, columns, group_size, symmetric)
        scales = torch.from_numpy(matrix.scales).to(dtype)
        matrix = matrix._replace(scales=scales.double().numpy())
        parts = {"qweight": awq_words(matrix.codes.T), "qzeros": awq_words(matrix.zeros), "scales": scales}
        return parts, matrix.weight()

    return layout


def uint32(words):
    return torch.from_numpy(np.ascontiguousarray(words))


def mlx_affine(group_size=64, bits=4, dtype=torch.bfloat16, of=None):
    """The layout; ``of`` gives bits and group size of a module. Biases are numbers of their own, no products."""

    def layout(module, rows, columns):
        width, size = of(module) if of else (bits, group_size)
        matrix = drawn(module, rows, columns, size, False, width)
        scales = torch.from_numpy(matrix.scales.T.copy()).to(dtype)
        biases = torch.from_numpy(seed_of(module).uniform(-0.1, 0.1, scales.shape)).to(dtype)
        weight = torch.from_numpy(matrix.codes) * scales.double()[:, matrix.groups] + biases.double()[:, matrix.groups]
        return {"weight": uint32(bit_fields(matrix.codes, width)), "scales": scales, "biases": biases}, weight

    return layout


def mlx_mxfp4(module, rows, columns):
    random = seed_of(module)
    codes = random.integers(0, 16, (rows, columns))
    exponents = random.integers(103, 143, (rows, columns // 32)).astype(np.uint8)
    scales = 2.0 ** (exponents.astype(int) - 127)
    parts = {"weight": uint32(bit_fields(codes, 4)), "scales": torch.from_numpy(exponents)}
    return parts, torch.from_numpy(E2M1[codes] * scales.repeat(32, 1))


def compressed(group_size=32, symmetric=True, bits=4, dtype=torch.bfloat16, old_zeros=False, g_idx=None):
    """The layout; ``g_idx`` adds an order of columns: "absent" as it is marked, or "act-order"."""

    def layout(module, rows, columns):
        matrix = drawn(module, rows, columns, group_size, symmetric, bits, g_idx == "act-order")
        scales = torch.from_numpy(matrix.scales).to(dtype)
        matrix = matrix._replace(scales=scales.double().numpy())
        parts = {
            "weight_packed": int32(bit_fields(matrix.codes, bits)),
            "weight_scale": scales.t().contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if old_zeros:
            parts["weight_zero_point"] = torch.from_numpy((matrix.zeros.T - (1 << (bits - 1))).astype(np.int8))
        elif not symmetric:
            parts["weight_zero_point"] = int32(bit_fields(matrix.zeros, bits).T)
        if g_idx is not None:
            order = matrix.groups if g_idx == "act-order" else np.full(columns, -1)
            parts["weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
        return parts, matrix.weight()

    return layout


def compressed_mxfp4(module, rows, columns):
    parts, weight = mlx_mxfp4(module, rows, columns)
    return {"weight_packed": parts["weight"].view(torch.uint8), "weight_scale": parts["scales"]}, weight


def hqq(group_size=64, bits=4, axis=1, dtype=np.float16, encoded=True):
    def layout(module, rows, columns):
        random, runs = seed_of(module), rows * columns // group_size
        shape = (runs, group_size) if axis == 1 else (group_size, runs)
        each = (runs, 1) if axis == 1 else (1, runs)
        codes = random.integers(0, 1 << bits, shape).astype(np.uint8)
        scale, zero = random.uniform(0.002, 0.02, each).astype(dtype), random.uniform(0, 15, each).astype(dtype)
        per_byte = 8 // bits
        packed = sum(part << (8 - bits - bits * place) for place, part in enumerate(np.split(codes, per_byte)))
        parts = {"W_q": packed.astype(np.uint8), "scale": scale, "zero": zero}
        if encoded:
            parts |= {"shape": np.array([rows, columns]), "nbits": np.array(bits, np.int32)}
            parts |= {"axis": np.array(axis, np.int32), "packing": np.frombuffer(b"4bit_u8", np.uint8).copy()}
        weight = (codes - zero.astype(float)) * scale.astype(float)
        return {name: torch.from_numpy(part) for name, part in parts.items()}, torch.from_numpy(
            weight.reshape(rows, columns)
        )

    return layout
