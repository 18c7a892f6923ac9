"""Copies of blocks over static buffers: which blocks are alike, what is copied, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import batch, loaded
from torch import nn

from mebp_triton.blocks.replay import OpaqueModule
from mebp_triton.blocks.static_block import CannotBeStatic, LiveBlock, StaticBlock, counting_attributes
from mebp_triton.blocks.static_buffers import StaticBuffers
from mebp_triton.layers.linear import Int4LoRALinear


@pytest.fixture(scope="module")
def model(shared_store: Any) -> Any:
    """A model that the tests leave as it was."""
    return loaded(shared_store("qwen2"))


def live(model: Any, index: int = 0) -> LiveBlock:
    blocks = model.mebp.engine.blocks
    own = type(blocks[index]).forward.__get__(blocks[index])
    return LiveBlock(blocks[index], own, counting_attributes(blocks))


def test_what_counts_blocks(model: Any) -> None:
    assert counting_attributes(model.mebp.engine.blocks) == {("self_attn", "layer_idx")}
    assert counting_attributes(model.mebp.engine.blocks[:1]) == frozenset()


def test_like_blocks_have_one_likeness(model: Any) -> None:
    blocks = [live(model, index) for index in range(3)]
    assert blocks[0].likeness == blocks[1].likeness == blocks[2].likeness
    assert len({block.addresses() for block in blocks}) == 3
    names = {name for name, _ in model.mebp.engine.blocks[0].named_parameters() if "proj.weight" not in name}
    assert len(blocks[0].tensors()) == len(names) == 2 + 3 + 14


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")
def test_experts_cannot_be_static(shared_store: Any) -> None:
    with pytest.raises(CannotBeStatic, match="which of its experts run"):
        live(loaded(shared_store("qwen3_moe")))


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp, "more", 1),
        lambda block: setattr(block.mlp.up_proj, "scaling", 0.25),
        lambda block: setattr(block.mlp, "act_fn", nn.GELU()),
        lambda block: setattr(block, "forward_more", nn.Identity()),
        lambda block: setattr(block.mlp.up_proj, "lora_A", nn.Parameter(torch.zeros(9, 48))),
        lambda block: block.train(),
        lambda block: setattr(block.self_attn, "is_causal", False),
    ],
)
def test_other_modules_and_attributes(shared_store: Any, change: Any, monkeypatch: Any) -> None:
    """Without kernels for small operations: a block that has them, and another activation since, is not static."""
    monkeypatch.setattr("mebp_triton.models.load.has_kernels", lambda *_: False)
    model = loaded(shared_store("qwen2"))
    first, second = live(model, 0), live(model, 1)
    assert first.likeness == second.likeness and second.unchanged()
    change(model.mebp.engine.blocks[1])
    assert live(model, 1).likeness != first.likeness


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp.up_proj, "scaling", 0.25),
        lambda block: setattr(block.mlp, "act_fn", nn.GELU()),
        lambda block: setattr(block.mlp.up_proj, "lora_A", nn.Parameter(torch.zeros(4, 48))),
        lambda block: block.train(),
        lambda block: block.self_attn.config.__setattr__("_attn_implementation", "eager"),
        lambda block: block.mlp.register_forward_hook(lambda *_: None),
        lambda block: delattr(block.self_attn, "is_causal"),
        lambda block: setattr(block.self_attn, "is_causal_as_well", True),
        lambda block: setattr(block.mlp, "__class__", type("Other", (type(block.mlp),), {})),
        lambda block: setattr(block.mlp.up_proj, "bias", nn.Parameter(torch.zeros(80))),
        lambda block: block.mlp.factors.append(2.0),
    ],
)
def test_a_change_is_seen_at_a_glance(shared_store: Any, change: Any) -> None:
    model = loaded(shared_store("qwen2"))
    model.mebp.engine.blocks[0].mlp.factors = [1.0]
    block = live(model)
    model(**batch())
    assert block.unchanged()
    change(model.mebp.engine.blocks[0])
    assert not block.unchanged()


def test_a_copy_computes_from_its_buffers_and_the_weights_in_place(model: Any) -> None:
    block, buffers = live(model), StaticBuffers()
    copies = [StaticBlock(block, buffers), StaticBlock(live(model, 1), buffers)]
    assert copies[0].slots == copies[1].slots, "like blocks share buffers"
    buffers.fill(zip(copies[0].slots, block.tensors(), strict=True))
    for own, part in zip(model.mebp.engine.blocks[0].modules(), copies[0].module.modules(), strict=True):
        if isinstance(own, Int4LoRALinear) and isinstance(part, Int4LoRALinear):
            assert part.lora_A.data_ptr() != own.lora_A.data_ptr() and torch.equal(part.lora_A, own.lora_A)
            assert part.int4().packed.data_ptr() == own.int4().packed.data_ptr()
            assert part.int4().scales.data_ptr() == own.int4().scales.data_ptr()
            assert "tape" not in vars(part) and "stacks" not in vars(part)
            if part.shared_input is not None:
                assert set(part.shared_input.layers) <= set(copies[0].module.modules())
    assert copies[0].module.self_attn.config is model.config
    copies[0].train_only({3})
    assert [tensor.requires_grad for tensor in copies[0].tensors].count(True) == 1
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)


def test_chunks_of_a_copy_do_not_ask_for_random_states(shared_store: Any) -> None:
    """A graph could not be captured: the host waits for the device's generator."""
    block = live(loaded(shared_store("llama"), mlp_chunk_tokens=7))
    parts = [
        [part.draws for part in module.modules() if isinstance(part, OpaqueModule)]
        for module in (block.module, StaticBlock(block, StaticBuffers()).module)
    ]
    assert parts == [[True], [False]]


def unusual(block: nn.Module, what: str) -> None:
    if what == "an open file":
        block.mlp.thing = open("/dev/null")  # noqa: SIM115
    elif what == "a tensor":
        block.mlp.thing = torch.ones(2)
    elif what == "a module elsewhere":
        block.mlp.thing = [nn.Identity()]
    elif what == "hooks":
        block.mlp.register_forward_pre_hook(lambda *_: None)
    else:
        block.mlp.forward = block.mlp.forward


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("an open file", "its attribute thing is a TextIOWrapper"),
        ("a tensor", "its attribute thing is a Tensor"),
        ("a module elsewhere", "its attribute thing is a Identity"),
        ("hooks", "a module inside of it has hooks"),
        ("a forward", "the forward of a module inside of it was replaced"),
    ],
)
def test_what_cannot_be_copied(shared_store: Any, what: str, reason: str) -> None:
    model = loaded(shared_store("qwen2"))
    unusual(model.mebp.engine.blocks[0], what)
    with pytest.raises(CannotBeStatic, match=reason):
        live(model)


def test_a_forward_that_somebody_replaced(model: Any) -> None:
    block = model.mebp.engine.blocks[0]
    with pytest.raises(CannotBeStatic, match="its forward was replaced"):
        LiveBlock(block, lambda *args: None)
