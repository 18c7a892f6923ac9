"""Int4 modules: tensors put in place from outside, and tables that only decode the rows asked for."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from lora_layers import make_weight
from torch import nn

from mebp_triton.kernels import reference
from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.names import SCHEMES
from mebp_triton.layers import int4_module
from mebp_triton.layers.int4_module import AbsentWeight, Int4Embedding, Int4Module, replace_embedding, restore_embedding
from mebp_triton.layers.linear import Int4Linear


class Scaled(nn.Embedding):
    """A subclass scales the rows, as Gemma's does, and that has to stay."""

    def forward(self, ids):
        return super().forward(ids) * 3


def embedding(dtype=torch.float32):
    module = nn.Embedding(30, 70)
    replace_embedding(module, make_weight(30, 70), dtype, "auto")
    return module


@pytest.mark.parametrize(("kind", "factor"), [(nn.Embedding, 1), (Scaled, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replaced_in_place(kind, factor, dtype):
    module, weight = kind(30, 70, padding_idx=0), make_weight(30, 70)
    replace_embedding(module, weight, dtype, "auto")
    ids = torch.tensor([[0, 3], [29, 3]])
    assert isinstance(module, kind) and isinstance(module, Int4Embedding)
    assert torch.equal(module(ids), reference.decode(weight, dtype)[ids] * factor)
    assert module.num_embeddings == 30 and module.padding_idx == 0
    assert not list(module.parameters())


def test_its_weight_has_a_shape_but_no_memory():
    module = embedding(torch.bfloat16)
    assert (tuple(module.weight.shape), module.weight.dtype) == ((30, 70), torch.bfloat16)
    assert isinstance(module.weight, AbsentWeight)


def test_rows_that_come_from_elsewhere(monkeypatch):
    module, weight, asked = nn.Embedding(30, 70), make_weight(30, 70), []

    class Rows:
        def gather(self, ids):
            asked.append(ids)
            return weight.gather(ids.reshape(-1))

    replace_embedding(module, weight, torch.float32, "auto")
    ids = torch.tensor([[4, 0, 29], [4, 7, 1]])
    whole = module(ids)
    module.rows = Rows()
    assert torch.equal(module(ids), whole) and [part.tolist() for part in asked] == [[4, 0, 29, 4, 7, 1]]
    asked.clear()
    monkeypatch.setattr(int4_module, "GATHERED", 4)
    assert torch.equal(module(ids), whole) and [part.tolist() for part in asked] == [[4, 0, 29, 4], [7, 1]]


def test_rows_of_an_absent_weight_are_decoded():
    """Gemma 4 reads that of the padding token; a scale of the embedding's own forward is not applied."""
    weight, module = make_weight(30, 70), embedding(torch.float32)
    truth = reference.decode(module.int4(), torch.float32)
    assert weight.shape == module.weight.shape
    ids = torch.tensor([[4, 0], [29, 4]])
    assert torch.equal(module.weight[3, :], truth[3]) and torch.equal(module.weight[-1], truth[-1])
    assert torch.equal(module.weight[ids], truth[ids])
    assert torch.equal(nn.functional.embedding(ids, module.weight), truth[ids])
    with pytest.raises(IndexError):
        module.weight[30]


def test_computing_with_an_absent_weight_is_an_error():
    weight, hidden = embedding().weight, torch.ones(2, 70)
    assert weight.device.type == "cpu" and not weight.requires_grad and weight.ndim == 2 and "30" in repr(weight)
    for compute in (
        lambda: hidden @ weight.t(),
        lambda: nn.functional.linear(hidden, weight),
        lambda: weight.float().sum(),
        lambda: weight * 2,
        lambda: weight.numpy(),
        lambda: weight.tolist(),
    ):
        with pytest.raises((RuntimeError, TypeError), match="head='float'|numpy|tolist"):
            compute()


def test_the_device_of_a_table_that_lies_elsewhere():
    module = embedding()
    module.device = torch.device("meta")
    assert module.weight.device.type == "meta" and module.int4().packed.device.type == "cpu"
    assert embedding().to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("in_place", [True, False])
def test_slices_of_an_absent_weight_are_decoded(in_place):
    """Trainers of TRL multiply by the head's weight slice by slice."""
    module, weight = embedding(), make_weight(30, 70)
    if not in_place:
        module.rows = SimpleNamespace(gather=lambda ids: weight.gather(ids.reshape(-1)))
    whole = reference.decode(weight, torch.float32)
    for rows in (slice(3, 9), slice(28, 99), slice(None), slice(-2, None), slice(1, 20, 4)):
        assert torch.equal(module.weight[rows], whole[rows]), rows


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_an_embedding_becomes_float_again(kind):
    module, ids = kind(30, 70, padding_idx=0), torch.tensor([[0, 3], [29, 3]])
    before = set(vars(module))
    replace_embedding(module, make_weight(30, 70), torch.bfloat16, "auto")
    expected = module(ids)
    weight = restore_embedding(module)
    assert type(module) is kind and set(vars(module)) == before and set(module.state_dict()) == {"weight"}
    assert torch.equal(module(ids), expected) and weight is module.weight and not weight.requires_grad


def test_a_table_is_not_copied_alone():
    with pytest.raises(ValueError, match="cannot be copied, which PEFT's modules_to_save does"):
        copy.deepcopy(embedding())


@pytest.mark.parametrize("borrowed", [True, False])
def test_a_copy_shares_what_is_a_stores_alone(borrowed):
    model = nn.ModuleDict({"embedding": embedding(), "linear": Int4Linear(make_weight(), None, torch.float32)})
    for module in model.values():
        module.borrowed = borrowed
    twin = copy.deepcopy(model)
    for name, module in model.items():
        for kind, tensor in module.int4().tensors().items():
            other = twin[name].int4().tensors()[kind]
            assert torch.equal(other, tensor) and (other.data_ptr() == tensor.data_ptr()) == borrowed
    twin.to("meta")
    assert model["linear"].weight.device.type == "cpu" and twin["linear"].weight.device.type == "meta"
    if borrowed:
        with pytest.raises(TypeError, match="a model of load cannot be pickled"):
            pickle.dumps(model["linear"])
    else:
        assert torch.equal(pickle.loads(pickle.dumps(model["linear"])).weight, model["linear"].weight)


def test_each_kind_of_module_has_a_place_of_its_own_for_the_codes():
    for operation in (lambda module: module._packed(), lambda module: module._set_packed(torch.ones(1))):
        with pytest.raises(NotImplementedError):
            operation(Int4Module())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_loaded_from_their_bytes_too(scheme, scale_dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [random_weight(9, 70, torch.device("cpu"), scheme, 32, scale_dtype, generator) for _ in range(2)]
    module, other = (Int4Linear(weight, None, torch.float32) for weight in weights)
    state = other.state_dict()
    for name in ("scales", "minimum", "super_scales", "super_minimum"):
        if name in state:
            state[name] = state[name].view(torch.uint8).t().contiguous().t()  # in any layout
    module.load_state_dict(state)
    for name, tensor in other.int4().tensors().items():
        found = module.int4().tensors()[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name


def test_what_does_not_fit_is_torchs_to_refuse():
    module = Int4Linear(make_weight(), None, torch.float32)
    module.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key.*minimum"):
        module.load_state_dict(module.state_dict() | {"minimum": torch.ones(4, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        module.load_state_dict(module.state_dict() | {"scales": torch.ones(2, 2)})


def test_moved_and_cast_at_once():
    module = Int4Linear(make_weight(), None, torch.float32).to("meta", torch.bfloat16)
    assert (module.scales.device.type, module.scales.dtype) == ("meta", torch.float16)


def test_the_weight_is_made_anew_when_and_only_when_its_tensors_are_others():
    """By replacing a parameter or a buffer, by writing to ``.data``, by moving the module, by a copy of it."""
    module, other = Int4Linear(make_weight(), None, torch.float32), make_weight(seed=1)
    first = module.int4()
    assert module.int4() is first and torch.equal(first.packed, module.weight)
    module.weight.data = other.packed
    assert module.int4().packed.data_ptr() == other.packed.data_ptr()
    both = torch.stack((first.packed, other.packed))
    for packed in both:  # as where somebody keeps all weights in one buffer
        module.weight.data = packed
        assert module.int4().packed.data_ptr() == packed.data_ptr()
    module._buffers["scales"] = other.scales
    assert module.int4().scales is other.scales
    module.weight = nn.Parameter(first.packed, requires_grad=False)
    assert module.int4().packed.data_ptr() == first.packed.data_ptr()
    assert copy.deepcopy(module).int4().packed.data_ptr() != first.packed.data_ptr()
    module.set_int4(other)
    assert module.int4() is other
    module.to("meta")
    assert module.int4().device.type == "meta" and module.int4() is not other
