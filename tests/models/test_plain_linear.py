"""Layers that compute what ``nn.Linear`` computes, and layers that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from mebp_triton.models.plain_linear import is_plain_linear


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-10, 10))


class Grouped(nn.Linear):
    groups = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (self.groups, -1))).flatten(-2)


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_product(bias: bool) -> None:
    with torch.device("meta"):
        layer = FalconLinear(32, 64, bias=bias)
    before = dict(vars(layer))
    assert is_plain_linear(layer) and is_plain_linear(nn.Linear(3, 4)) and is_plain_linear(Conv1D(3, 4))
    assert vars(layer) == before and layer.in_features == 32


@pytest.mark.parametrize("kind", [Clipped, Grouped, Scaled, Noisy])
def test_other_products(kind: Any) -> None:
    assert not is_plain_linear(kind(32, 64))


def test_other_modules() -> None:
    router = Llama4Router(type("Config", (), {"hidden_size": 32, "num_local_experts": 4, "num_experts_per_tok": 1})())
    assert not is_plain_linear(router) and not is_plain_linear(nn.Embedding(3, 4)) and not is_plain_linear(nn.ReLU())
