"""Part ``memory``: the memory that forward and backward of one LoRA layer take beyond their inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.names import Scheme
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.system.memory import peak_resident_bytes

from .session import Session

LIMIT_MIB = 40


def memory(session: Session) -> None:
    rows = session.results["rows"] = []
    for scheme in ("symmetric", "affine", "codebook"):
        (n, k), m = session.sizes.memory_shape, session.sizes.memory_tokens
        layer = make_layer(session, n, k, scheme)
        x = normal(m, k, dtype=session.dtype, device=session.device).requires_grad_()
        dy = normal(m, n, dtype=session.dtype, device=session.device)
        _step(layer, x, dy)  # compiles, and makes the library's workspace
        extra = extra_bytes(session, layer, x, dy)
        row = {"scheme": scheme, "m": m, "n": n, "k": k, "extra_mib": extra / 2**20, "limit_mib": LIMIT_MIB}
        rows.append(row)
        # In a rehearsal the resident set says nothing.
        if session.on_gpu and extra > LIMIT_MIB << 20:
            session.fail(f"more than {LIMIT_MIB} MiB: {row}")


def make_layer(session: Session, n: int, k: int, scheme: Scheme = "symmetric") -> Int4LoRALinear:
    """A LoRA layer whose B is not zero, so that the adapter changes the output."""
    weight = random_weight(n, k, session.device, scheme)
    layer = Int4LoRALinear(weight, None, session.dtype, rank=16, scaling=2.0, backend="triton")
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.02)
    return layer.train()


def _step(layer: Int4LoRALinear, x: Tensor, dy: Tensor) -> None:
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    layer(x).backward(dy)


def extra_bytes(session: Session, layer: Int4LoRALinear, x: Tensor, dy: Tensor) -> int:
    """The peak of one step, less the memory in use before it, the output and the gradients."""
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    outputs = dy.nbytes + x.nbytes + layer.lora_A.nbytes + layer.lora_B.nbytes
    if not session.on_gpu:
        before = peak_resident_bytes()
        _step(layer, x, dy)
        return peak_resident_bytes() - before
    torch.cuda.synchronize(session.device)
    torch.cuda.reset_peak_memory_stats(session.device)
    before = torch.cuda.memory_allocated(session.device)
    _step(layer, x, dy)
    torch.cuda.synchronize(session.device)
    return torch.cuda.max_memory_allocated(session.device) - before - outputs
