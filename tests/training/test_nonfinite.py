"""The parameter, output or gradient with which a number that is not finite began is named."""

import math

import pytest
import torch
from models import batch, randomize_adapter, tiny_store

import mebp_triton as mebp
from mebp_triton.training.nonfinite import broken_gradient, broken_output, broken_parameter


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    made = mebp.load(tiny_store(request.param), mebp.LoraConfig(r=4), weights="file")
    randomize_adapter(made)
    return made.train()


def last_block(model):
    return len(model.mebp.engine.blocks) - 1


def test_nothing_is_broken(model):
    model(**batch()).loss.backward()
    assert broken_parameter(model) is broken_gradient(model) is broken_output(model, [batch()]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_is_named_with_its_block(model, value):
    parameter = model.mebp.engine.trainable(1)[3]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    name = next(name for name, other in model.named_parameters() if other is parameter)
    assert broken_parameter(model) == f"{name} (block 1)"


def test_of_gradients_the_nearest_to_the_loss_is_named(model):
    model(**batch()).loss.backward()
    top, below = model.mebp.engine.trainable(last_block(model))[0], model.mebp.engine.trainable(0)
    for parameter in (top, *below):
        parameter.grad.view(-1)[0] = math.nan
    name = next(name for name, other in model.named_parameters() if other is top)
    assert broken_gradient(model) == f"{name} (block {last_block(model)})"


def test_the_innermost_first_module_is_named_and_no_hook_is_left(model):
    block = model.mebp.engine.blocks[1]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    name = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, mebp.Int4LoRALinear) and module in set(block.modules())
    )
    module = model.get_submodule(name)
    handle = module.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([2]), math.nan)
    )
    assert broken_output(model, [batch(), batch(seed=3)]) == f"{name} (block 1)"
    handle.remove()
    assert broken_output(model, [batch()]) is None
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_outside_of_the_blocks(model):
    with torch.no_grad():
        norm = [module for module in model.modules() if "norm" in type(module).__name__.lower()][-1]
        norm.weight[0] = math.nan
    name = broken_output(model, [batch()])
    assert name is not None and "block" not in name and model.get_submodule(name) is norm
