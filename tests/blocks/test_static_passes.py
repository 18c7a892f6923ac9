"""The passes of a block as functions from static buffers to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import Block
from torch import Tensor

from mebp_triton.blocks.call import Arguments
from mebp_triton.blocks.replay import ForwardState
from mebp_triton.blocks.static_block import CannotBeStatic, LiveBlock, StaticBlock
from mebp_triton.blocks.static_buffers import StaticBuffers
from mebp_triton.blocks.static_passes import StaticBackward, StaticForward, leaf_keys

AUTOCAST = ForwardState(torch.device("cpu"), random=False).autocast


def made(sort: Any, scale: Tensor | None = None, **wanted: Any) -> tuple[Block, LiveBlock, Any, list[Any]]:
    torch.manual_seed(0)
    block = Block(6)
    arguments = Arguments((torch.randn(2, 3, 6),), {"scale": scale, "flag": "kept"})
    live, buffers = LiveBlock(block, block.forward), StaticBuffers()
    step = sort(StaticBlock(live, buffers), buffers, arguments, arguments.leaves, AUTOCAST, **wanted)
    return block, live, step, arguments.leaves


def test_forward_gives_the_output_in_memory_of_its_own() -> None:
    block, live, step, leaves = made(StaticForward)
    step.fill(leaves, 0, live.tensors())
    step()
    first = step.results()
    with torch.no_grad():
        assert first[1] == "kept" and torch.equal(first[0], block(leaves[0])[0])
        other = torch.randn(2, 3, 6)
        step.fill([other, *leaves[1:]], 0, live.tensors())
        step()
        assert torch.equal(first[0], block(leaves[0])[0]), "the first result was written over"
        assert torch.equal(step.results()[0], block(other)[0])
    assert not first[0].requires_grad


def test_backward_gives_the_gradients_that_are_wanted() -> None:
    scale, grad = torch.randn(6), torch.randn(2, 3, 6)
    block, live, step, leaves = made(StaticBackward, scale, places=(0, 1), slots=(1, 2), grads=[grad])
    step.fill(leaves, 0, live.tensors(), [grad])
    step()
    hidden, factor = leaves[0].requires_grad_(), scale.requires_grad_()
    wanted = [hidden, factor, *(list(block.parameters())[place] for place in (1, 2))]
    expected = torch.autograd.grad(block(hidden, factor)[0], wanted, grad)
    assert all(map(torch.equal, step.results(), expected))
    assert [tensor.requires_grad for tensor in step.block.tensors] == [False, True, True, False]


def test_a_gradient_that_there_is_not() -> None:
    scale, grad = torch.randn(6), torch.randn(2, 3, 6)
    _, live, step, leaves = made(StaticBackward, scale, places=(0,), slots=(), grads=[grad])
    step.block.module.register_parameter("unused", None)
    step.fill(leaves, 0, live.tensors(), [grad])
    step()
    assert len(step.results()) == 1 and step.results()[0] is not None


def test_what_the_buffers_hold_already_is_not_copied_again() -> None:
    scale = torch.randn(6)
    _, live, step, leaves = made(StaticForward, scale)
    filled: list[int] = []
    own = step.buffers.copy
    step.buffers.copy = lambda targets, sources: (filled.append(len(targets)), own(targets, sources))
    step.fill(leaves, 0, live.tensors())
    step.fill(leaves, 0, live.tensors())
    scale.add_(1)
    step.fill(leaves, 0, live.tensors())
    assert filled == [6, 5, 6], "the input and four parameters always, the scale where it has changed"


def test_keys_tell_layouts_and_values_apart() -> None:
    x = torch.ones(2, 3)
    assert leaf_keys([x, None, True]) == leaf_keys([x + 1, None, True])
    keys = [leaf_keys([leaf]) for leaf in (x, x.t(), x[:1], x.double(), True, 1, 1.0, None, "1")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("leaf", [{}, object(), torch.ones(2).to_sparse()])
def test_leaves_that_no_buffer_holds(leaf: Any) -> None:
    with pytest.raises(CannotBeStatic, match="an argument is a"):
        leaf_keys([leaf])
