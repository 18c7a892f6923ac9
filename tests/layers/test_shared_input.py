"""Layers with one input, computed together: when that happens, and that it changes no result."""

from __future__ import annotations

import copy

import pytest
import torch
from allocations import Products
from lora_layers import adapted, joined
from torch import Tensor

from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.lora_function import int4_lora_linears


def pair(**options: float) -> tuple[Int4LoRALinear, Int4LoRALinear]:
    """Two layers that share an input."""
    layers = adapted(20, seed=0, **options), adapted(9, seed=1, **options)
    joined(*layers)
    return layers


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, 70, generator=torch.Generator().manual_seed(1))


def alone(layer: Int4LoRALinear, x: Tensor) -> Tensor:
    """The output of ``layer``, computed on its own."""
    return int4_lora_linears(x, [layer.operand()])[0]


def together(*outputs: Tensor) -> bool:
    """Whether one computation made the outputs: then one node of the graph has all of them."""
    return len({output.grad_fn for output in outputs}) == 1


def gradients(layers: tuple[Int4LoRALinear, ...], x: Tensor, used: tuple[int, ...]) -> tuple[bool, list[Tensor | None]]:
    """Whether the layers were computed together; the loss and its gradients."""
    x = x.clone().requires_grad_(True)
    outputs = [layer(x) for layer in layers]
    total = sum(((index + 1) * outputs[index]).square().sum() for index in used)
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    found = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    return together(*outputs), [total.detach(), *found]


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)], ids=str)
def test_the_same_gradients_as_one_by_one(used: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    layers = tuple(adapted(n, rank=r, seed=n, bias=n == 9) for n, r in zip((20, 9, 33), ranks, strict=True))
    at_once, expected = gradients(layers, x(2, 5), used)
    assert not at_once
    joined(*layers)
    at_once, found = gradients(layers, x(2, 5), used)
    assert at_once
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_dx_is_written_once() -> None:
    layers = pair()
    with Products() as products:
        gradients(layers, x(4), (0, 1))
    assert products.rows == [4, 4] and products.transposed == [], "one of them had a dX of its own"
    with Products() as products:
        gradients((adapted(20), adapted(9)), x(4), (0, 1))
    assert products.transposed == [4, 4]


def test_frozen_members_and_inputs_get_no_gradient() -> None:
    layers = pair()
    layers[0].lora_A.requires_grad_(False)
    layers[1].lora_B.requires_grad_(False)
    given = x(4)
    sum(layer(given).sum() for layer in layers).backward()
    assert layers[0].lora_A.grad is None and layers[1].lora_B.grad is None and given.grad is None
    assert layers[0].lora_B.grad is not None and layers[1].lora_A.grad is not None


# --- everything else is computed alone ------------------------------------------------------------------------------


def test_another_input() -> None:
    (first, second), given = pair(), x(4)
    outputs = first(given), second(given.clone())
    assert not together(*outputs) and torch.equal(outputs[1], alone(second, given))
    assert not first.shared_input._waiting, "nothing waits for a call that may never come"


def test_an_input_changed_in_place() -> None:
    (first, second), given = pair(), x(4)
    first(given)
    given.mul_(2)
    assert torch.equal(second(given), alone(second, given))


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "scales", "bias"])
def test_a_tensor_of_the_layer_changed_in_between(name: str) -> None:
    (first, second), given = pair(bias=True), x(4)
    first(given)
    with torch.no_grad():
        getattr(second, name).mul_(2)
    assert torch.equal(second(given), alone(second, given))


def test_the_scaling_changed_in_between() -> None:
    (first, second), given = pair(), x(4)
    first(given)
    second.scaling *= 2
    assert torch.equal(second(given), alone(second, given))


def test_gradients_switched_on_in_between() -> None:
    (first, second), given = pair(), x(4)
    with torch.no_grad():
        first(given)
    assert second(given).requires_grad


def test_autocast_switched_on_in_between() -> None:
    (first, second), given = pair(), x(4)
    first(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert second(given).dtype == torch.bfloat16
        first(given)
    with torch.autocast("cpu", dtype=torch.float16):
        assert second(given).dtype == torch.float16


def test_another_order() -> None:
    (first, second), given = pair(), x(4)
    with Products() as products:
        output = second(given)
    assert products.rows == [4] and not together(output, first(given))


def test_a_second_call_with_the_same_input() -> None:
    (first, second), given = pair(), x(4)
    wanted = second(given), second(given)
    outputs = first(given), second(given), second(given)
    assert together(*outputs[:2]) and not together(*outputs[1:])
    torch.testing.assert_close(outputs[1], wanted[0])
    assert torch.equal(outputs[2], wanted[1])


def test_dropout() -> None:
    """The layers' masks differ."""
    (first, second), given = pair(dropout=0.5), x(4)
    with Products() as products:
        first.train()(given)
    assert products.rows == [4]
    first.eval()  # one of them still drops out
    with Products() as products:
        first(given)
    assert products.rows == [4]
    second.eval()
    assert together(first(given), second(given))


def test_in_a_compiled_function() -> None:
    """One graph without a break, and the same results."""
    layers, given = pair(), x(4)
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], fullgraph=True, backend="aot_eager")
    for ours, layer in zip(compiled(given), layers, strict=True):
        torch.testing.assert_close(ours, alone(layer, given))


@pytest.mark.parametrize("made_within", [False, True])
def test_inference_mode(made_within: bool) -> None:
    """Its tensors do not count how often they were changed."""
    with torch.inference_mode(made_within):
        layers = pair()
    given = x(4)
    with torch.no_grad():
        wanted = [alone(layer, given) for layer in layers]
    with torch.inference_mode():
        found = [layer(torch.clone(given)) for layer in layers] + [layer(given) for layer in layers]
    for ours, theirs in zip(found, wanted * 2, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_an_output_can_be_changed_in_place() -> None:
    """Some modelling code clamps q, k and v."""
    layers, given = pair(), x(2, 4).requires_grad_(True)
    sum(layer(given).clamp_(-1, 1).sum() for layer in layers).backward()
    assert given.grad is not None


def test_a_copy_waits_for_nothing() -> None:
    (first, _), given = pair(), x(4)
    output = first(given)
    twin = copy.deepcopy(first)
    assert twin.shared_input is not None and twin.shared_input.layers[0] is twin and not twin.shared_input._waiting
    torch.testing.assert_close(twin(given), output)


def test_nothing_is_kept_once_all_are_served() -> None:
    layers = adapted(20), adapted(9, seed=1), adapted(12, seed=2)
    group, given = joined(*layers), x(4)
    for layer in layers:
        layer(given)
    assert group._input is None and not group._waiting
    layers[0](given)
    assert group._input is given
    group.forget()
    assert group._input is None and not group._waiting
