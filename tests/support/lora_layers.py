"""Random int4 layers with an adapter, and their formula in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.shared_input import SharedInput


def make_weight(
    n: int = 9, k: int = 70, scheme: str = "symmetric", group_size: int = 32, seed: int = 0, bits: int = 4
) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scales = (0.1 * torch.randn(groups, n, generator=generator)).half()
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    minimum = torch.randn(groups, n, generator=generator).half() if scheme == "affine" else None
    codebook = torch.randn(16, generator=generator) if scheme == "codebook" else None
    return Int4Weight.from_codes(codes, scales, group_size, minimum, codebook, bits)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora_formula(x: Tensor, weight: Int4Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``X·Wᵀ + bias + scaling·(X·Aᵀ)·Bᵀ``, for autograd to differentiate."""
    y = x @ decode(weight, x.dtype).t()
    y = y if bias is None else y + bias.to(x.dtype)
    return y + scaling * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()


def operands(
    dtype: torch.dtype = torch.float64, n: int = 9, k: int = 70, rank: int = 3, lead: tuple[int, ...] = (2, 4)
) -> dict[str, Tensor]:
    """x, bias, a and b, all of which require a gradient."""
    shapes = {"x": (*lead, k), "bias": (n,), "a": (rank, k), "b": (n, rank)}
    return {
        name: normal(*shape, dtype=dtype, seed=i).requires_grad_(True) for i, (name, shape) in enumerate(shapes.items())
    }


def adapted(
    n: int = 9, k: int = 70, seed: int = 0, bias: bool = False, scheme: str = "symmetric", **options: Any
) -> Int4LoRALinear:
    """An adapted layer whose B is not zero; ``options`` are the layer's."""
    options = {"rank": 3, "scaling": 0.5, "generator": torch.Generator().manual_seed(seed)} | options
    own = normal(n, seed=seed) if bias else None
    layer = Int4LoRALinear(make_weight(n, k, scheme, seed=seed), own, torch.float32, **options)
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(seed + 100))
    return layer


def joined(*layers: Int4LoRALinear) -> SharedInput:
    """Makes the layers one group that shares its input."""
    group = SharedInput(layers)
    for layer in layers:
        layer.shared_input = group
    return group
