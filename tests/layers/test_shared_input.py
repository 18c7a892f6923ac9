"""Layers with one input, computed together: who they are, and that it changes no result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, tiny_config  # type: ignore[import-not-found]
from torch import Tensor

from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.layers import linear, lora_function
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.lora_function import int4_lora_linears
from mebp_triton.layers.shared_input import SharedInput
from mebp_triton.models import discover
from mebp_triton.models.discover import join_shared_inputs, shared_inputs


def layer(
    n: int, k: int = 70, rank: int = 3, seed: int = 0, bias: bool = False, dropout: float = 0.0
) -> Int4LoRALinear:
    generator = torch.Generator().manual_seed(seed)
    weight, _ = quantize_matrix(torch.randn(n, k, generator=generator), "symmetric", 32)
    b = torch.randn(n, generator=generator) if bias else None
    made = Int4LoRALinear(weight, b, torch.float32, rank, 0.5, dropout, generator=generator)
    torch.nn.init.normal_(made.lora_B, generator=generator)
    return made


def joined(*layers: Int4LoRALinear) -> SharedInput:
    group = SharedInput(layers)
    for member in layers:
        member.shared_input = group
    return group


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each computation took together."""
    counts: list[int] = []

    def counted(x: Tensor, operands: Any, *rest: Any) -> Any:
        counts.append(len(operands))
        return int4_lora_linears(x, operands, *rest)

    monkeypatch.setattr(lora_function, "int4_lora_linears", counted)
    return counts


def gradients(layers: tuple[Int4LoRALinear, ...], x: Tensor, used: tuple[int, ...]) -> list[Tensor | None]:
    x = x.clone().requires_grad_(True)
    outputs = [member(x) for member in layers]
    total = sum(((index + 1) * outputs[index]).square().sum() for index in used)
    parameters = [p for member in layers for p in (member.lora_A, member.lora_B)]
    return [total.detach(), *torch.autograd.grad(total, [x, *parameters], allow_unused=True)]


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)], ids=str)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)], ids=str)
def test_the_same_gradients_as_one_by_one(calls: list[int], used: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    layers = tuple(layer(n, rank=r, seed=n, bias=n == 9) for n, r in zip((20, 9, 33), ranks, strict=True))
    x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(1))
    alone = gradients(layers, x, used)
    assert calls == [1, 1, 1]
    joined(*layers)
    together = gradients(layers, x, used)
    assert calls == [1, 1, 1, 3]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_dx_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layer(20), layer(9, seed=1)
    joined(*layers)
    seen: list[int] = []
    original = linear.int4_matmul_dx_group
    monkeypatch.setattr(
        linear, "int4_matmul_dx_group", lambda dys, *rest: seen.append(len(dys)) or original(dys, *rest)
    )
    monkeypatch.setattr(linear, "int4_matmul_dx", lambda *args: pytest.fail("one of them had a dX of its own"))
    gradients(layers, torch.randn(4, 70), (0, 1))
    assert seen == [2]


def test_frozen_members_and_inputs_get_no_gradient() -> None:
    layers = layer(20), layer(9, seed=1)
    joined(*layers)
    layers[0].lora_A.requires_grad_(False)
    layers[1].lora_B.requires_grad_(False)
    x = torch.randn(4, 70)
    sum(member(x).sum() for member in layers).backward()
    assert layers[0].lora_A.grad is None and layers[1].lora_B.grad is None and x.grad is None
    assert layers[0].lora_B.grad is not None and layers[1].lora_A.grad is not None


class TestAnythingElseIsComputedAlone:
    def test_another_input(self, calls: list[int]) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        first(x)
        assert torch.equal(second(x.clone()), int4_lora_linears(x, [second.operand()])[0])
        assert calls[:2] == [2, 1]

    def test_an_input_changed_in_place(self) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        first(x)
        x.mul_(2)
        assert torch.equal(second(x), int4_lora_linears(x, [second.operand()])[0])

    def test_parameters_changed_in_between(self) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        first(x)
        with torch.no_grad():
            second.lora_B.mul_(2)
        assert torch.equal(second(x), int4_lora_linears(x, [second.operand()])[0])

    def test_gradients_switched_on_in_between(self) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        with torch.no_grad():
            first(x)
        assert second(x).requires_grad

    def test_autocast_switched_on_in_between(self) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert second(x).dtype == torch.bfloat16

    def test_another_order(self, calls: list[int]) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        second(x)
        assert calls == [1]

    def test_a_second_call_with_the_same_input(self, calls: list[int]) -> None:
        first, second = layer(20), layer(9, seed=1)
        joined(first, second)
        x = torch.randn(4, 70)
        wanted = second(x), second(x)
        outputs = first(x), second(x), second(x)
        torch.testing.assert_close(outputs[1], wanted[0])
        assert torch.equal(outputs[2], wanted[1])

    def test_dropout(self, calls: list[int]) -> None:
        """Their masks differ."""
        layers = layer(20, dropout=0.5), layer(9, seed=1, dropout=0.5)
        joined(*layers)
        x = torch.randn(4, 70)
        for member in layers:
            member.train()(x)
        assert 2 not in calls

    def test_in_a_compiled_function(self) -> None:
        """One graph, no breaks; and the same results."""
        layers = layer(20), layer(9, seed=1)
        joined(*layers)
        x = torch.randn(4, 70)
        compiled = torch.compile(lambda x: [member(x) for member in layers], fullgraph=True, backend="aot_eager")
        for ours, member in zip(compiled(x), layers, strict=True):
            torch.testing.assert_close(ours, int4_lora_linears(x, [member.operand()])[0])


@pytest.mark.parametrize("made_within", [False, True])
def test_inference_mode(made_within: bool) -> None:
    """Its tensors do not count their changes."""
    with torch.inference_mode(made_within):
        layers = layer(20), layer(9, seed=1)
    joined(*layers)
    x = torch.randn(4, 70)
    with torch.no_grad():
        wanted = [int4_lora_linears(x, [member.operand()])[0] for member in layers]
    with torch.inference_mode():
        found = [member(torch.clone(x)) for member in layers] + [member(x) for member in layers]
    for ours, theirs in zip(found, wanted * 2, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_output_can_be_changed_in_place() -> None:
    """Some modelling code clamps q, k and v."""
    layers = layer(20), layer(9, seed=1)
    joined(*layers)
    x = torch.randn(2, 4, 70, requires_grad=True)
    sum(member(x).clamp_(-1, 1).sum() for member in layers).backward()
    assert x.grad is not None


def test_a_copy_waits_for_nothing() -> None:
    first, second = layer(20), layer(9, seed=1)
    joined(first, second)
    x = torch.randn(4, 70)
    first(x)
    twin = copy.deepcopy(first)
    assert twin.shared_input is not None and twin.shared_input.layers[0] is twin and not twin.shared_input._waiting
    torch.testing.assert_close(twin(x), first(x))


def test_nothing_is_kept_once_all_are_served() -> None:
    layers = layer(20), layer(9, seed=1), layer(12, seed=2)
    group = joined(*layers)
    x = torch.randn(4, 70)
    for member in layers:
        member(x)
    assert group._input is None and not group._waiting
    layers[0](x)
    group.forget()
    assert group._input is None and not group._waiting


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_found_from_the_modelling_code(architecture: str) -> None:
    groups = shared_inputs(tiny_config(architecture))
    names = [site.name for sites in groups for site in sites]
    assert len(set(names)) == len(names)
    ends = {tuple(site.name.rpartition(".")[2] for site in sites) for sites in groups}
    if architecture in ("llama", "qwen2", "gemma3_text", "mistral"):
        assert ends == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_a_model_that_cannot_run_so_is_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> Any:
        raise ValueError("Odd does not run on the meta device: no kernel")

    monkeypatch.setattr(discover, "shared_inputs", refuse)
    with pytest.warns(UserWarning, match="Odd does not run .* one by one"):
        join_shared_inputs(torch.nn.Linear(2, 2), None)


def test_the_config_is_left_as_it_was() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    shared_inputs(config)
    assert config.to_dict() == before
