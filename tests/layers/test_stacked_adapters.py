"""Adapters in the dtype in which they compute: where they lie, and that none is ever stale."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lora_layers import adapted, joined, normal
from torch import Tensor, nn

from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.shared_input import layers_by_input
from mebp_triton.layers.stacked_adapters import AdapterBuffers, BlockAdapters, Frame, Stacked, adapter_of, stack

BF16 = torch.bfloat16


def block(ranks: tuple[int, ...] = (3, 3, 3), seed: int = 0, biases: str = "k") -> nn.ModuleDict:
    """Three layers of one input, some of which have a bias, and a layer alone."""
    rows = (20, 9, 33)
    layers = [
        adapted(n, rank=r, seed=seed + place, bias="qkv"[place] in biases)
        for place, (n, r) in enumerate(zip(rows, ranks, strict=True))
    ]
    joined(*layers)
    return nn.ModuleDict({"q": layers[0], "k": layers[1], "v": layers[2], "o": adapted(7, seed=seed + 9)})


def group(module: nn.ModuleDict) -> list[Int4LoRALinear]:
    return [module[name] for name in "qkv"]


def is_stack_of(stacked: Stacked, layers: list[Int4LoRALinear], dtype: torch.dtype) -> bool:
    """Whether the stack holds the layers' tensors as they are now, rounded once, and zeros for what they lack."""
    rank = max(layer.lora_A.shape[0] for layer in layers)
    assert stacked.a.dtype == stacked.b.dtype == dtype
    assert stacked.a.data_ptr() % 16 == stacked.b.data_ptr() % 16 == 0 or len(layers) == 1
    a = [nn.functional.pad(layer.lora_A, (0, 0, 0, rank - layer.lora_A.shape[0])) for layer in layers]
    b = [nn.functional.pad(layer.lora_B, (0, rank - layer.lora_B.shape[1])) for layer in layers]
    bias = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    wanted = [torch.cat(a), torch.cat(b), torch.cat(bias)]
    found = [stacked.a, stacked.b, torch.zeros_like(wanted[2]) if stacked.bias is None else stacked.bias]
    return all(torch.equal(ours, own.to(dtype).to(ours.dtype)) for ours, own in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)], ids=str)
def test_a_stack(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    layers = group(block(ranks))
    stacked = stack([adapter_of(layer) for layer in layers], dtype)
    assert is_stack_of(stacked, layers, dtype) and stacked.bias is not None
    assert stack([adapter_of(layer) for layer in layers[::2]], dtype).bias is None


@pytest.mark.parametrize("biases", ["", "k", "qkv"])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)], ids=str)
def test_what_memory_held_before_is_in_no_stack(ranks: tuple[int, ...], biases: str) -> None:
    """The memory is another block's stack, or uninitialised; what a layer lacks is zero in any case."""
    layers = group(block(ranks, biases=biases))
    adapters = [[adapter_of(layer) for layer in layers]]
    frame = Frame(adapters, torch.full((Frame.elements(adapters),), math.nan))
    frame.fill(adapters)
    assert is_stack_of(frame.groups[0], layers, torch.float32)


def test_a_layer_alone_in_its_dtype_is_not_copied() -> None:
    layer = adapted(9, bias=True)
    own = stack([adapter_of(layer)], torch.float32)
    assert own.a is layer.lora_A and own.b is layer.lora_B and own.bias is layer.bias
    assert is_stack_of(stack([adapter_of(layer)], BF16), [layer], BF16)


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """While active, counts operations that write the copies of adapters."""

    launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.launches += func in (torch.ops.aten._foreach_copy_.default, torch.ops.aten.zero_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ranks", "biases", "launches"),
    [((3, 3, 3), "", 1), ((3, 3, 3), "qkv", 1), ((3, 3, 3), "k", 2), ((1, 4, 2), "", 2)],
)
def test_a_pass_of_a_block_stacks_all_in_one_launch(ranks: tuple[int, ...], biases: str, launches: int) -> None:
    """And one more that clears what no layer fills."""
    first, second = block(ranks, biases=biases), block(ranks, 20, biases)
    buffers = AdapterBuffers()
    memory = set()
    for module in (first, second, first):
        adapters, layers = BlockAdapters(layers_by_input(module), buffers), group(module)
        with Copies() as copies, adapters:
            assert all(layer.stacks is adapters for layer in (*layers, module["o"]))
            whole = adapters.stacked(layers, BF16)
            alone = [adapters.stacked([layer], BF16) for layer in (*layers, module["o"])]
        assert copies.launches == launches
        assert whole is not None and is_stack_of(whole, layers, BF16)
        rank = max(ranks)
        for place, one in enumerate(alone[:3]):
            assert one is not None and torch.equal(one.a, whole.a[place * rank : (place + 1) * rank])
        assert alone[3] is not None and is_stack_of(alone[3], [module["o"]], BF16)
        memory.add(whole.a.data_ptr())
        assert layers[0].stacks is None
    assert len(memory) == 1, "like blocks have buffers of their own"


def test_what_needs_no_copy_has_none() -> None:
    module = nn.ModuleDict({"o": adapted(7), "down": adapted(9, seed=1)})
    with BlockAdapters(layers_by_input(module), AdapterBuffers()) as _, Copies() as copies:
        assert module["o"].stacks.stacked([module["o"]], torch.float32) is None
    assert copies.launches == 0


def test_another_order_has_no_stack() -> None:
    module = block()
    layers = group(module)
    with BlockAdapters(layers_by_input(module), AdapterBuffers()):
        assert layers[0].stacks.stacked(layers[:2], BF16) is None


@pytest.mark.parametrize("change", ["version", "data", "other", "bias"])
def test_every_pass_reads_the_parameters_anew(change: str) -> None:
    module = block()
    layers, adapters = group(module), BlockAdapters(layers_by_input(module), AdapterBuffers())
    with adapters:
        adapters.stacked(layers, BF16)
    with torch.no_grad():
        if change == "version":
            layers[1].lora_B.mul_(2)
        elif change == "data":
            layers[1].lora_B.data.mul_(2)
        elif change == "bias":
            layers[1].bias.data.mul_(2)
        else:
            layers[1].lora_B = nn.Parameter(normal(9, 3, seed=8))
    with adapters:
        assert is_stack_of(adapters.stacked(layers, BF16), layers, BF16)


@pytest.mark.parametrize("change", ["version", "other", "written over"])
def test_a_change_within_a_pass_is_seen(change: str) -> None:
    module = block()
    layers, buffers = group(module), AdapterBuffers()
    with BlockAdapters(layers_by_input(module), buffers) as _, torch.no_grad():
        adapters = layers[0].stacks
        assert adapters.stacked(layers, BF16) is not None
        if change == "version":
            layers[2].lora_A.mul_(2)
        elif change == "other":
            layers[2].lora_A = nn.Parameter(layers[2].lora_A.clone())
        else:
            other = block(seed=20)
            with BlockAdapters(layers_by_input(other), buffers):
                other["q"].stacks.stacked(group(other), BF16)
        assert adapters.stacked(layers, BF16) is None


def test_a_view_of_the_same_memory_is_the_same() -> None:
    """Leaves that stand in for the parameters, where an MLP is differentiated by chunks."""
    module = block()
    layers = group(module)
    with BlockAdapters(layers_by_input(module), AdapterBuffers()):
        stacked = layers[0].stacks.stacked(layers, BF16)
        layers[0]._parameters["lora_A"] = layers[0].lora_A.detach().requires_grad_(True)
        assert layers[0].stacks.stacked(layers, BF16) is stacked


def test_another_view_of_the_same_memory_is_not() -> None:
    """Where somebody keeps the adapters of several layers in one buffer."""
    module, both = block(), normal(2, 3, 70)
    layers = group(module)
    layers[0].lora_A = nn.Parameter(both[0])
    with BlockAdapters(layers_by_input(module), AdapterBuffers()):
        assert layers[0].stacks.stacked(layers, BF16) is not None
        layers[0].lora_A = nn.Parameter(both[1])
        assert layers[0].stacks.stacked(layers, BF16) is None


def gradients(module: nn.ModuleDict, x: Tensor, adapters: BlockAdapters | None) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if adapters is not None:
        adapters.__enter__()
    outputs = [module[name](x) for name in "qkv"]
    total = sum(output.float().square().sum() for output in (*outputs, module["o"](x)))
    found = torch.autograd.grad(total, [x, *parameters])
    if adapters is not None:
        adapters.__exit__()
    return [total, *found]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_same_gradients_with_and_without(dtype: torch.dtype, dropout: float) -> None:
    module, x = block((1, 4, 2)), normal(2, 5, 70).to(dtype).requires_grad_(True)
    for layer in module.values():
        layer.lora_dropout.p = dropout
    torch.manual_seed(3)
    found = gradients(module, x, BlockAdapters(layers_by_input(module), AdapterBuffers()))
    torch.manual_seed(3)
    for ours, own in zip(found, gradients(module, x, None), strict=True):
        # To the bit where the shapes of the products are the same: a layer alone is padded to the rank of all.
        torch.testing.assert_close(ours, own, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)


def test_a_graph_that_outlives_its_pass_is_refused() -> None:
    """Rather than computed with the adapters of another block."""
    module, other, buffers = block(), block(seed=20), AdapterBuffers()
    x = normal(4, 70).to(BF16).requires_grad_(True)
    with BlockAdapters(layers_by_input(module), buffers):
        y = module["q"](x)
    with BlockAdapters(layers_by_input(other), buffers):
        other["q"](x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_threads() -> None:
    """Both run blocks of one model, as a server does: neither writes over what the other computes with."""
    module, other, buffers = block(), block(seed=20), AdapterBuffers()
    blocks = {id(one): BlockAdapters(layers_by_input(one), buffers) for one in (module, other)}
    x = normal(4, 70).to(BF16)
    wanted = other["q"](x)

    def run(one: nn.ModuleDict) -> tuple[Stacked | None, Tensor]:
        with blocks[id(one)]:
            return one["q"].stacks.stacked(group(one), BF16), one["q"](x)

    with ThreadPoolExecutor(1) as second, blocks[id(module)]:
        stacked = module["q"].stacks.stacked(group(module), BF16)
        none, y = second.submit(run, other).result()
        assert none is None and torch.equal(y, wanted)
        # The other thread ends a pass of this block as well, after which nothing is stacked anew.
        version = stacked.a._version
        assert second.submit(run, module).result()[0] is None
        assert blocks[id(module)].stacked(group(module), BF16) is stacked and stacked.a._version == version
        assert is_stack_of(stacked, group(module), BF16)
    with ThreadPoolExecutor(1) as third:
        assert third.submit(run, other).result()[0] is not None
    with blocks[id(module)], blocks[id(other)]:  # a pass within a pass of the same thread
        assert blocks[id(other)].stacked(group(other), BF16) is not None


def test_in_inference_mode() -> None:
    """A buffer that is made there can be saved for a backward pass later; inference tensors are stacked anew."""
    module = block()
    adapters, x = BlockAdapters(layers_by_input(module), AdapterBuffers()), normal(4, 70).to(BF16)
    with torch.inference_mode(), adapters:
        module["q"](x.clone())
    with adapters:
        module["q"](x.requires_grad_(True)).sum().backward()
    with torch.inference_mode():
        made = block()
        with BlockAdapters(layers_by_input(made), AdapterBuffers()):
            assert made["q"].stacks.stacked(group(made), BF16) is None


def test_a_copy_of_the_model_has_buffers_of_its_own() -> None:
    module = block()
    adapters = BlockAdapters(layers_by_input(module), AdapterBuffers())
    with adapters:
        adapters.stacked(group(module), BF16)
    twin, own = copy.deepcopy((module, adapters))
    assert own.buffers is not adapters.buffers and not own.buffers._buffers
    with own:
        assert twin["q"].stacks is own and is_stack_of(own.stacked(group(twin), BF16), group(twin), BF16)


def test_layers_by_input() -> None:
    module = block()
    assert layers_by_input(module) == [tuple(group(module)), (module["o"],)]
    # A group that reaches beyond the module is none of its own.
    part = nn.ModuleDict({"q": module["q"], "k": module["k"]})
    assert layers_by_input(part) == [(module["q"],), (module["k"],)]
