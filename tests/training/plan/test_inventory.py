"""An inventory lists what a store holds."""

import pytest
import torch
from int4_models import quantized
from models import ARCHITECTURES, bnb_directory
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
