"""Small stacks of plain blocks, in float64, to hold the block engine against autograd."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mebp_triton.blocks.engine import BlockEngine


class Block(nn.Module):
    """A residual block whose last layer is followed by additions only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> tuple[Tensor, str]:
        out = hidden_states + self.down(torch.tanh(self.up(hidden_states)))
        return (out if scale is None else out * scale), flag


class Stack(nn.Module):
    """Blocks one after the other; the output is a loss."""

    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count)).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, flag = block(hidden_states=x, flag="kept")
            assert flag == "kept"
        return x.square().sum()


def twins() -> tuple[Stack, Stack, BlockEngine, Tensor]:
    """A plain stack, its copy under an engine, that engine, and an input."""
    plain = Stack()
    ours = copy.deepcopy(plain)
    return plain, ours, BlockEngine(ours.blocks), torch.randn(3, 6, dtype=torch.float64)


def grads(stack: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in stack.parameters()]


def equal_bits(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    """Whether both have gradients in the same places, and these are the same to the bit."""
    same = [
        left is right is None or left is not None and right is not None and torch.equal(left, right)
        for left, right in zip(ours, theirs, strict=True)
    ]
    return all(same) and any(gradient is not None for gradient in ours)
