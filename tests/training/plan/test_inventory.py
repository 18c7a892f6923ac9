"""An inventory lists what a store holds."""

import pytest
import torch
from int4_models import quantized
from models import ARCHITECTURES, bnb_directory
from packed_layouts import gptq, hqq
from packed_models import packed_directory
from transformers import AutoConfig

from mebp_triton.convert.quantize import quantize
from mebp_triton.store.reader import Store
from mebp_triton.training.plan.inventory import Inventory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_store_that_does_not_exist_yet_has_the_same_tensors(shared_store, architecture):
    store = shared_store(architecture)
    config = AutoConfig.from_pretrained(store)
    real, made = Inventory.of_store(Store(store)), Inventory.of_config(config, group_size=32)
    assert made.tied_head == real.tied_head and made.floats == real.floats and made.files.keys() == real.files.keys()
    assert {name: info.shape for name, info in made.matrices.items()} == {
        name: info.shape for name, info in real.matrices.items()
    }
    for name, tensors in real.files.items():
        shapes = {tensor: shape for tensor, (_, shape) in tensors.items()}
        assert {tensor: shape for tensor, (_, shape) in made.files[name].items()} == shapes
        header = real.sizes[name] - made.sizes[name]
        assert 0 < header < 300 * len(tensors)


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"scheme": "affine"}, {"scheme": "codebook"}])
def test_what_is_taken_over_from_bitsandbytes_has_its_dtypes(tmp_path, options):
    source = bnb_directory(tmp_path, bnb_4bit_quant_type="nf4")
    quantize(source, tmp_path / "store", **options)
    real = Inventory.of_store(Store(tmp_path / "store"))
    made = Inventory.of_config(AutoConfig.from_pretrained(source), **options)
    assert made.files == real.files


@pytest.mark.parametrize(
    ("layout", "stated"),
    [
        (gptq(64, True, act_order=True), {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}),
        (gptq(64, True, bits=8), {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True}),
        (hqq(32, 8), {"quant_method": "hqq", "quant_config": {"nbits": 8, "group_size": 32, "axis": 1}}),
        (hqq(64, axis=0), {"quant_method": "hqq", "quant_config": {"nbits": 4, "group_size": 64, "axis": 0}}),
    ],
    ids=["act-order", "8 bits", "hqq, 8 bits", "hqq, axis 0"],
)
def test_forms_of_packed_directories(tmp_path, layout, stated):
    packed_directory(tmp_path / "model", layout, {"quantization_config": stated})
    quantize(tmp_path / "model", tmp_path / "store", scale_search=False)
    real = Inventory.of_store(Store(tmp_path / "store"))
    made = Inventory.of_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert {name: info.form for name, info in made.matrices.items()} == {
        name: info.form for name, info in real.matrices.items()
    }


@pytest.mark.parametrize(
    ("asked", "bits"),
    [({}, 4), ({"scheme": "symmetric"}, 4), ({}, 8), ({"scheme": "symmetric"}, 8), ({"scheme": "codebook"}, 8)],
)
def test_what_is_taken_over_from_int4_layers_has_its_form(shared_store, tmp_path, asked, bits):
    source = tmp_path / "int4"
    model = quantized(shared_store("llama").parent / "model", torch.float32, scheme="affine", bits=bits)
    model.save_pretrained(source)
    quantize(source, tmp_path / "store", **asked)
    real = Inventory.of_store(Store(tmp_path / "store"))
    made = Inventory.of_config(AutoConfig.from_pretrained(source), **asked)
    assert {name: info.form for name, info in made.matrices.items()} == {
        name: info.form for name, info in real.matrices.items()
    }
    assert made.files == real.files
