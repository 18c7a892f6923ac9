"""Rounds a float matrix to our forms, to bitsandbytes' or to GGUF's, and counts the bits that it then takes.

A form is a string: "affine 32 4 float16" (scheme, group size, bits, dtype of scales) of ours, "nf4 64" or
"fp4 64 double" of bitsandbytes, a type or a mix of types ("Q4_K", "Q4_K_M") of GGUF.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mebp_triton.kernels.names import Scheme
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode


class Rounded(NamedTuple):
    """A decoded matrix, float32, and the bits of all that it is stored as."""

    weight: Tensor
    bits: int


def ours(weight: Tensor, form: str) -> Rounded:
    scheme, size, bits, scale = form.split()
    known: dict[str, Scheme] = {"symmetric": "symmetric", "affine": "affine", "codebook": "codebook"}
    packed, _ = quantize_matrix(weight, known[scheme], int(size), scale_dtype=getattr(torch, scale), bits=int(bits))
    return Rounded(decode(packed, torch.float32), 8 * packed.nbytes)


def bitsandbytes(weight: Tensor, form: str) -> Rounded:
    """Tables that all matrices share do not count."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind, size, *double = form.split()
    codes, state = quantize_4bit(weight, blocksize=int(size), quant_type=kind, compress_statistics=bool(double))
    nbytes = codes.nbytes + state.absmax.nbytes
    if double:
        nbytes += state.state2.absmax.nbytes + state.offset.nbytes
    return Rounded(dequantize_4bit(codes, state), 8 * nbytes)


# What llama.cpp takes where a row is no multiple of 256.
FALL_BACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def gguf(weight: Tensor, form: str) -> Rounded:
    import libgguf

    if libgguf.row_size(kind := libgguf.GGMLQuantizationType[form], weight.shape[1]) == 0:
        kind = libgguf.GGMLQuantizationType[FALL_BACK[form]]
    codes = libgguf.quantize_rows(weight.numpy(), kind)
    return Rounded(torch.from_numpy(libgguf.dequantize_rows(codes, kind)), 8 * codes.nbytes)


def type_in_mix(mix: str, module: str, layers: int) -> str:
    """The GGUF type of a matrix in a mix of types, by llama.cpp's rules; a type is the mix of itself alone."""
    if mix != "Q4_K_M":
        return mix
    parts = module.split(".")
    if parts[-1] in ("v_proj", "down_proj"):
        layer = next(int(part) for part in parts if part.isdigit())
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return "Q6_K" if more else "Q4_K"
    return "Q4_K" if "layers" in parts else "Q6_K"


TOOLS = {"mebp": ours, "bitsandbytes": bitsandbytes, "libgguf": gguf}
