"""One call of one block: its gradients are those of plain autograd, and what it reads may not change in between."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from models import relative_rms
from stacks import Block, Stack, equal_bits, grads, twins
from torch import Tensor, nn

from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.store.block_inputs import FileBlockInputs


def test_full_equals_plain_autograd() -> None:
    plain, ours, engine, x = twins()
    a, b = plain(x), ours(x)
    a.backward()
    b.backward()
    assert torch.equal(a, b) and equal_bits(grads(ours), grads(plain))
    assert engine.counters.pop_counts() == {"forward": 4, "recompute": 4, "identity": 0, "checkpoint": 4}


def test_exact_equals_autograd_with_the_others_frozen() -> None:
    plain, ours, engine, x = twins()
    engine.treatment = lambda index: "train" if index in (1, 3) else "exact"
    for index in (0, 2):
        plain.blocks[index].requires_grad_(False)
    plain(x).backward()
    ours(x).backward()
    assert equal_bits(grads(ours), grads(plain))
    # Block 0 lies below the lowest selected block: no backward. Block 2 passes the gradient on by its recompute.
    assert engine.counters.pop_counts() == {"forward": 4, "recompute": 3, "identity": 0, "checkpoint": 3}
    assert all(p.requires_grad for p in ours.parameters())


def test_identity_equals_a_detached_residual() -> None:
    plain, ours, engine, x = twins()
    engine.treatment = lambda index: "train" if index in (0, 2) else "identity"
    value = ours(x)
    value.backward()
    hidden = x
    for index, block in enumerate(plain.blocks):
        out, _ = block(hidden)
        hidden = out if index in (0, 2) else hidden + (out - hidden).detach()
    hidden.square().sum().backward()
    for left, right in zip(grads(plain), grads(ours), strict=True):
        assert (left is None) == (right is None)
        assert left is None or relative_rms(right, left) < 1e-12
    assert torch.equal(value, Stack()(x)), "the forward pass of identity is exact"
    assert engine.counters.pop_counts() == {"forward": 4, "recompute": 2, "identity": 2, "checkpoint": 2}


def test_identity_does_not_read_the_blocks_it_passes() -> None:
    """Neither its weights nor its input: both may have changed, and nothing is kept."""
    plain, ours, engine, x = twins()
    engine.treatment = lambda index: "train" if index == 0 else "identity"
    loss = ours(x)
    with torch.no_grad():
        for block in ours.blocks[1:]:
            for parameter in block.parameters():
                parameter.fill_(float("nan"))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.blocks[0].parameters())
    first, _ = plain.blocks[0](x)
    out = first
    for block in plain.blocks[1:]:
        out, _ = block(out)
    first.backward(2 * out.detach())
    for left, right in zip(plain.blocks[0].parameters(), ours.blocks[0].parameters(), strict=True):
        assert relative_rms(right.grad, left.grad) < 1e-12


def test_identity_passes_the_gradient_of_the_hidden_state_alone() -> None:
    """Of a block that returns more than that."""

    class Pair(Block):
        def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> Any:
            out, _ = super().forward(hidden_states, scale, flag)
            return out, 3 * out

    block = Pair(6).double()
    engine = BlockEngine([block])
    engine.treatment = lambda index: "identity"
    engine.is_below = lambda index, requires_grad: False  # type: ignore[method-assign]
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(6, dtype=torch.float64, requires_grad=True)
    out, other = block(scale=scale, hidden_states=x)
    dy = torch.randn(2, 6, dtype=torch.float64)
    torch.autograd.backward([out, other], [dy, torch.ones_like(other)])
    assert torch.equal(x.grad, dy) and scale.grad is None


# --- as autograd does it --------------------------------------------------------------------------------------------


def test_gradients_accumulate_and_autograd_grad_works() -> None:
    plain, ours, _, x = twins()
    for one in (plain, ours):
        one.blocks[0].up.weight.grad = torch.ones_like(one.blocks[0].up.weight)
        one(x).backward()
        one(2 * x).backward()
    assert equal_bits(grads(ours), grads(plain))
    weight = "blocks.1.down.weight"
    found = [torch.autograd.grad(one(x), dict(one.named_parameters())[weight])[0] for one in (plain, ours)]
    assert torch.equal(*found)


def test_retained_graph_runs_backward_twice() -> None:
    plain, ours, _, x = twins()
    for one in (plain, ours):
        loss = one(x)
        loss.backward(retain_graph=True)
        loss.backward()
    assert equal_bits(grads(ours), grads(plain))


def test_a_second_derivative_is_an_error() -> None:
    _, ours, _, x = twins()
    weights = list(ours.parameters())
    (first, *_) = torch.autograd.grad(ours(x), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradient_reaches_inputs_beside_the_hidden_state() -> None:
    block, twin = Block(6).double(), Block(6).double()
    twin.load_state_dict(block.state_dict())
    BlockEngine([block])
    found = []
    for one in (block, twin):
        x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
        scale = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
        one(x, scale)[0].square().sum().backward()
        found.append((x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_selection_changed_between_forward_and_backward_does_not_matter() -> None:
    plain, ours, engine, x = twins()
    loss = ours(x)
    engine.treatment = lambda index: "identity"
    loss.backward()
    plain(x).backward()
    assert equal_bits(grads(ours), grads(plain))


def test_parameters_frozen_one_by_one_and_hooks_on_parameters() -> None:
    plain, ours, _, x = twins()
    seen: list[list[float]] = [[], []]
    for one, notes in ((plain, seen[0]), (ours, seen[1])):
        one.blocks[1].up.bias.requires_grad_(False)
        one.blocks[2].up.weight.register_hook(lambda grad, notes=notes: notes.append(float(grad.sum())) or 2 * grad)
        for _ in range(2):  # a hook stays where it was
            one(x).backward()
    assert seen[0] == seen[1] and len(seen[0]) == 2
    assert equal_bits(grads(ours), grads(plain))


class Odd(nn.Module):
    """Returns a dictionary of tensors with and without gradients, and of other things."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6).double()

    def forward(self, hidden: Tensor, residual: Tensor, mask: Tensor) -> dict[str, Any]:
        out = self.linear(hidden) + residual
        return {"out": [out, out.abs()], "mask": mask | (out > 0), "none": None, "number": 3}


def test_outputs_that_have_no_gradient_and_arguments_used_twice() -> None:
    plain = Odd()
    ours = copy.deepcopy(plain)
    BlockEngine([ours])
    found = []
    for one in (plain, ours):
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_(True)
        result = one(x, x, torch.zeros(2, 6, dtype=torch.bool))
        assert result["none"] is None and result["number"] == 3
        assert result["mask"].dtype == torch.bool and not result["mask"].requires_grad
        (result["out"][1] * 2).sum().backward()  # the first output is not used
        found.append((x.grad, one.linear.weight.grad, result["mask"]))
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_an_output_that_nobody_uses_has_no_gradient_not_zeros() -> None:
    """Zeros would keep the branch of that output in the backward pass."""
    seen: list[Tensor] = []

    class Watched(Odd):
        def forward(self, hidden: Tensor, residual: Tensor, mask: Tensor) -> dict[str, Any]:
            result = super().forward(hidden, residual, mask)
            if result["out"][0].requires_grad:
                branch = result["out"][0] * 2
                branch.register_hook(seen.append)
                result["out"].append(branch)
            else:
                result["out"].append(result["out"][0] * 2)
            return result

    block = Watched()
    BlockEngine([block])
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    result = block(x, x, torch.zeros(2, 6, dtype=torch.bool))
    result["out"][1].sum().backward()
    assert not seen and x.grad is not None


def test_the_hidden_state_need_not_come_first() -> None:
    plain, ours = Block(6).double(), Block(6).double()
    ours.load_state_dict(plain.state_dict())
    BlockEngine([ours])
    found = []
    for one in (plain, ours):
        x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
        one(scale=torch.full((6,), 2.0, dtype=torch.float64), hidden_states=x)[0].square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_an_output_that_depends_on_no_input() -> None:
    """Outside it seems to have a gradient, as every output; in the recompute it has none."""

    class Constant(Block):
        def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> Any:
            return super().forward(hidden_states)[0], torch.full((6,), 3.0, dtype=torch.float64)

    block = Constant(6).double()
    BlockEngine([block])
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    out, constant = block(x)
    (out * constant).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_gradient_that_ends_above_the_block() -> None:
    class End(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:  # type: ignore[override]
            return None

    _, ours, engine, x = twins()
    out, _ = ours.blocks[0](x)
    End.apply(out).sum().backward()
    assert engine.counters.recompute == 0 and all(grad is None for grad in grads(ours))


def test_an_output_of_integers_has_no_gradient() -> None:
    class Counted(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * hidden, hidden.argmax(-1)

    block = Counted()
    BlockEngine([block])
    out, places = block(torch.ones(2, 6, requires_grad=True))
    assert out.requires_grad and not places.requires_grad and places.dtype == torch.int64


def test_no_gradient_is_computed_for_parameters_that_are_not_trained() -> None:
    needs: list[tuple[bool, ...]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, *dys: Any) -> Any:
            needs.append(ctx.needs_input_grad)
            x, weight = ctx.saved_tensors
            return dys[0] * weight, (dys[0] * x).sum(0)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, hidden: Tensor) -> Tensor:
            return Product.apply(hidden, self.weight)

    blocks = [Scale() for _ in range(3)]
    engine = BlockEngine(blocks)
    engine.treatment = lambda index: "exact" if index == 1 else "train"
    x = torch.ones(2, 6)
    for block in blocks:
        x = block(x)
    x.sum().backward()
    assert needs == [(True, True), (True, False), (False, True)]
    assert [block.weight.grad is None for block in blocks] == [False, True, False]
    assert all(block.weight.requires_grad for block in blocks)


# --- between forward and backward -----------------------------------------------------------------------------------


def test_changed_inputs_and_parameters_are_errors() -> None:
    _, ours, _, x = twins()
    loss = ours(x)
    with torch.no_grad():
        ours.blocks[2].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="a parameter or an input of block 2 changed between"):
        loss.backward()
    _, ours, _, x = twins()
    loss = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_a_changed_input_beside_the_hidden_state_is_an_error() -> None:
    block, scale = Block(6).double(), torch.ones(6, dtype=torch.float64)
    BlockEngine([block])
    loss = block(torch.ones(2, 6, dtype=torch.float64), scale)[0].sum()
    scale.add_(1)
    with pytest.raises(RuntimeError, match="block 0 changed"):
        loss.backward()


def test_a_parameter_changed_in_a_block_that_passes_the_gradient_on_is_an_error() -> None:
    _, ours, engine, x = twins()
    engine.treatment = lambda index: "train" if index == 0 else "exact"
    loss = ours(x)
    with torch.no_grad():
        ours.blocks[2].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="block 2 changed"):
        loss.backward()


def test_a_block_that_changes_its_mode_before_the_backward_pass_is_an_error() -> None:
    """Its dropout would be another one."""
    _, ours, _, x = twins()
    value = ours(x)
    ours.eval()
    with pytest.raises(RuntimeError, match=r"went from train\(\) to eval\(\)"):
        value.backward()


def test_only_the_store_holds_a_blocks_input_between_forward_and_backward(tmp_path: Any) -> None:
    held: dict[str, list[Any]] = {"hidden": [], "scale": []}

    class Noting(Block):
        def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> tuple[Tensor, str]:
            held["hidden"].append(weakref.ref(hidden_states))
            held["scale"].append(weakref.ref(scale))
            return super().forward(hidden_states, scale, flag)

    blocks = [Noting(6).double() for _ in range(4)]
    engine = BlockEngine(blocks, block_inputs=FileBlockInputs(tmp_path))
    assert not engine.keep_outputs
    treatments = ("train", "exact", "identity", "train")
    engine.treatment = lambda index: treatments[index]
    x = torch.ones(2, 6, dtype=torch.float64)
    for _ in blocks:
        x, _flag = blocks[len(held["scale"])](x, torch.full((6,), 2.0, dtype=torch.float64))
    alive = {name: [reference() is not None for reference in references] for name, references in held.items()}
    assert alive["hidden"] == [False] * 4
    assert alive["scale"] == [True, True, False, True], "a recompute needs it, and identity has none"
    x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in blocks[0].parameters())
