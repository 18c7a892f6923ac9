"""Tells which layers compute what ``nn.Linear`` computes, so that an int4 layer may take their place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

PROBE_IN, PROBE_OUT = 6, 5
PROBE_SCALES = (1e-3, 1.0, 1e3)  # a layer that clips what it reads or gives differs at one of these


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear``, transformers' ``Conv1D``, or of a class that computes the same.

    A class that is derived from ``nn.Linear`` may do anything with its weight: Falcon's gives the same product, a
    router a choice of experts. Its own forward is tried on a small weight in float64.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or set(module._parameters) != {"weight", "bias"} or module._buffers:
        return False
    return not module._modules and _computes_the_product(module)


def _computes_the_product(module: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    probe: Any = copy.copy(module)
    vars(probe)["_parameters"] = {
        "weight": nn.Parameter(random(PROBE_OUT, PROBE_IN)),
        "bias": None if module.bias is None else nn.Parameter(random(PROBE_OUT)),
    }
    probe.in_features, probe.out_features = PROBE_IN, PROBE_OUT
    for scale in PROBE_SCALES:
        x = scale * random(2, 3, PROBE_IN)
        wanted = nn.functional.linear(x, probe.weight, probe.bias)
        try:
            with torch.no_grad():
                given = type(module).forward(probe, x)
        except Exception:  # it is made for other shapes, or for other arguments
            return False
        if not isinstance(given, torch.Tensor) or given.shape != wanted.shape:
            return False
        if not torch.allclose(given, wanted, rtol=1e-9, atol=1e-9 * scale):
            return False
    return True
