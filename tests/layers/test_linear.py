"""The linear layers over an int4 weight, frozen and adapted."""

import math

import peft
import pytest
import torch
from lora_layers import joined, lora_formula, make_weight, normal
from torch import nn

from mebp_triton.kernels import reference
from mebp_triton.kernels.names import SCHEMES
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear, compute_together


def layer(scheme="symmetric", bias=True, **options):
    options = {"rank": 3, "scaling": 2.0, "generator": torch.Generator().manual_seed(0)} | options
    return Int4LoRALinear(make_weight(scheme=scheme), normal(9) if bias else None, torch.float32, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme, bias):
    weight, bias = make_weight(scheme=scheme), normal(9) if bias else None
    module, x = Int4Linear(weight, bias, torch.float32), normal(2, 3, 70)
    torch.testing.assert_close(module(x), reference.matmul(x, weight, bias))
    assert isinstance(module, nn.Linear)
    assert module.weight.dtype == torch.uint8 and module.weight.data_ptr() == weight.packed.data_ptr()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.int4().scheme == scheme and scheme in repr(module)


def test_peft_takes_it_for_a_linear_layer():
    holder = nn.ModuleDict({"q": Int4Linear(make_weight(), None, torch.float32)})
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"]), holder)
    x = normal(4, 70)
    nn.init.normal_(wrapped["q"].lora_B["default"].weight)
    y = wrapped["q"](x)
    y.sum().backward()
    lora = [wrapped["q"].lora_A["default"].weight, wrapped["q"].lora_B["default"].weight]
    truth = lora_formula(x, make_weight(), None, *lora, wrapped["q"].scaling["default"])
    torch.testing.assert_close(y, truth)
    for parameter, exact in zip(lora, torch.autograd.grad(truth.sum(), lora), strict=True):
        torch.testing.assert_close(parameter.grad, exact)


def test_a_new_adapter_changes_nothing_and_is_that_of_peft():
    module, x = layer(), normal(4, 70)
    assert torch.equal(module(x), Int4Linear(make_weight(), normal(9), torch.float32)(x))
    assert not module.lora_B.any()
    bound = 1 / math.sqrt(70)  # kaiming_uniform_ with a = sqrt(5)
    assert module.lora_A.abs().max() <= bound and module.lora_A.std() > 0.4 * bound
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert torch.equal(layer().lora_A, module.lora_A)


def test_where_an_adapter_lies_and_in_which_dtype():
    small = layer(adapter_dtype=torch.bfloat16)
    assert small.lora_A.dtype == small.lora_B.dtype == torch.bfloat16 and small.fan_in_fan_out is False
    assert {layer(device="meta").lora_A.device.type, layer(device="meta").lora_B.device.type} == {"meta"}
    with_weight = Int4LoRALinear(make_weight().to("meta"), None, torch.float32, 3, 1.0)
    assert with_weight.lora_A.device.type == with_weight.lora_B.device.type == "meta"


def test_the_backend_is_the_modules():
    dropping = layer(dropout=0.5)
    for module in (Int4Linear(make_weight(), None, torch.float32), layer(), dropping):
        module.backend = "none"
        with pytest.raises(ValueError, match="backend"):
            module(normal(4, 70))


def test_dropout_is_on_the_input_of_the_lora_branch_only():
    module, x = layer(dropout=0.5), normal(4, 70).requires_grad_(True)
    nn.init.normal_(module.lora_B)
    module.train()
    torch.manual_seed(5)
    y = module(x)
    dy = normal(4, 9, seed=3)
    y.backward(dy)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    twin = x @ reference.decode(make_weight(), torch.float32).t() + normal(9)
    twin = twin + 2.0 * (dropped @ module.lora_A.t()) @ module.lora_B.t()
    torch.testing.assert_close(y, twin)
    asked = [x, module.lora_A, module.lora_B]
    for tensor, truth in zip(asked, torch.autograd.grad(twin, asked, dy), strict=True):
        torch.testing.assert_close(tensor.grad, truth)
    assert module(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_torchs_own_checkpointing(reentrant):
    """Which hands out what is saved for the backward pass only once."""
    module = layer()
    nn.init.normal_(module.lora_B)
    x = normal(4, 70).requires_grad_()
    asked, dy = (x, module.lora_A, module.lora_B), normal(4, 9)
    truth = torch.autograd.grad(module(x), asked, dy)
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).backward(dy)
    assert all(torch.equal(tensor.grad, expected) for tensor, expected in zip(asked, truth, strict=True))


def test_dropout_rests_outside_of_training():
    module, x = layer(dropout=0.9).eval(), normal(4, 70)
    nn.init.normal_(module.lora_B)
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_dtype_or_device_leaves_the_weight_what_it_is(scheme):
    """Its scales would be rounded, its codes be no codes."""
    module, weight = layer(scheme), make_weight(scheme=scheme)
    x = normal(4, 70)
    expected = module(x)
    module.to(torch.bfloat16)
    assert module.lora_A.dtype == module.lora_B.dtype == module.bias.dtype == torch.bfloat16
    for name, tensor in module.int4().tensors().items():
        assert torch.equal(tensor, weight.tensors()[name]) and tensor.dtype == weight.tensors()[name].dtype, name
    torch.testing.assert_close(module(x), expected, rtol=0.01, atol=0.02)
    module.to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert module.int4().scales.dtype == torch.float16


def test_repr():
    assert "in_features=70, out_features=9, 4 bits, symmetric, groups of 32, r=3" in repr(layer())


def test_weights_are_replaced_from_outside():
    module, x = layer("affine"), normal(4, 70)
    other = make_weight(scheme="codebook", seed=7)
    module.set_int4(other)
    torch.testing.assert_close(module(x), reference.matmul(x, other, normal(9)))
    assert module.int4().scheme == "codebook"


@pytest.mark.parametrize("module", [Int4Linear(make_weight(), None, torch.float32), layer()])
def test_under_autocast(module):
    with torch.autocast("cpu", torch.bfloat16):
        assert module(normal(4, 70)).dtype == torch.bfloat16
        assert module(normal(4, 70, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("kind", ["frozen", "adapted", "dropout", "sharing"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_integers_are_no_activations(kind, dtype):
    """nn.Linear raises too; code that casts to ``layer.weight.dtype`` would get garbage otherwise."""
    weight = make_weight()
    layer = Int4Linear(weight, None, torch.float32)
    if kind != "frozen":
        layer = Int4LoRALinear(weight, None, torch.float32, 3, 1.0, dropout=0.5 * (kind == "dropout"))
    if kind == "sharing":
        joined(layer, Int4LoRALinear(weight, None, torch.float32, 3, 1.0))
    with pytest.raises(TypeError, match=f"x is {dtype}, wanted a floating dtype.* must stay float"):
        layer(torch.ones(2, 70).to(dtype))


def test_a_scaler_sees_that_float16_overflowed_and_skips():
    """A gradient beyond float16 is infinite, not clamped and not NaN alone, and the scale falls."""
    module, x = layer(), normal(4, 70).requires_grad_(True)
    with torch.no_grad():
        module.lora_B.normal_(0, 0.1)
    optimizer = torch.optim.AdamW([module.lora_A, module.lora_B], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    changed, scales = [], []
    for _ in range(8):
        before = module.lora_B.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = module(x)
        assert y.dtype == torch.float16
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        changed.append(not torch.equal(before, module.lora_B))
        scales.append(scaler.get_scale())
    assert not changed[0] and scales[0] == 2.0**17 and changed[-1]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Tape:
    """Knows the outputs of some layers, and writes down every call."""

    def __init__(self, outputs):
        self.outputs, self.calls = outputs, []

    def lookup(self, layer, x):
        return self.outputs.get(layer)

    def record(self, layer, y):
        self.calls.append((layer, y))


def test_a_tape_gives_the_output_and_gets_every_call():
    module, x, known = layer(), normal(4, 70).requires_grad_(True), torch.full((4, 9), 7.0)
    computed = module(x)
    module.tape = Tape({})
    assert torch.equal(module(x), computed)
    module.tape = tape = Tape({module: known})
    y = module(x)
    assert torch.equal(y, known) and y.requires_grad
    assert len(tape.calls) == 1 and tape.calls[0][0] is module and tape.calls[0][1] is y


def test_layers_together_use_known_outputs_only_if_all_are_known():
    first, second, x = layer(), layer(), normal(4, 70)
    computed, known = compute_together([first, second], x), torch.full((4, 9), 7.0)
    first.tape, second.tape = Tape({first: known}), Tape({})
    assert all(torch.equal(ours, own) for ours, own in zip(compute_together([first, second], x), computed, strict=True))
    second.tape.outputs[second] = 2 * known
    outputs = compute_together([first, second], x)
    assert torch.equal(outputs[0], known) and torch.equal(outputs[1], 2 * known)
