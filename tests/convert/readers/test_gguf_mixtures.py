"""Experts of a GGUF file are taken over one by one, with the codes that the file has."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_models import EXPERT_FFN, write_variant  # noqa: E402
from gguf_shapes import EXPERTS, LATENT  # noqa: E402

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has experts as modules")


def bound(path: Path):
    source = open_source(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    source.bind(model)
    return source


def values(path: Path, name: str) -> np.ndarray:
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(("arch", "kind", "form"), [
    ("qwen3moe", "Q8_0", ("symmetric", 32, 8)),
    ("granitemoe", "Q4_0", ("symmetric", 32, 4)),
    ("deepseek2", "MXFP4", ("codebook", 32, 4)),
    ("gpt-oss", "MXFP4", ("codebook", 32, 4)),
])  # fmt: skip
def test_codes_of_an_expert_are_those_of_its_part_of_the_file(tmp_path, arch, kind, form):
    """gpt-oss takes the rows of gate and up by turns, and has its parameters transposed."""
    path = write_variant(tmp_path / "tiny.gguf", arch, "plain", {"_exps.weight": kind})
    source = bound(path)
    gate, up, down = (values(path, f"blk.1.ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
    prefix = "model.layers.1." + ("block_sparse_moe" if arch == "granitemoe" else "mlp") + ".experts."
    for expert in range(EXPERTS):
        joined = np.concatenate((gate[expert], up[expert]))
        if arch == "gpt-oss":
            joined = np.stack((gate[expert], up[expert]), 1).reshape(2 * EXPERT_FFN, -1)
        for name, wanted in (("gate_up_proj", joined), ("down_proj", down[expert])):
            weight = source.read(f"{prefix}{expert}.{name}.weight")
            assert isinstance(weight, Int4Weight) and weight.form == form, name
            assert np.array_equal(decode(weight, torch.float32).numpy(), wanted), (expert, name)
    whole = source.read(f"{prefix}down_proj")
    assert np.array_equal(whole.numpy(), down.swapaxes(1, 2) if arch == "gpt-oss" else down)


def test_gate_and_up_of_two_types_are_decoded_and_named(tmp_path):
    kinds = {"ffn_gate_exps.weight": "Q8_0", "ffn_up_exps.weight": "MXFP4"}
    path = write_variant(tmp_path / "tiny.gguf", "qwen3moe", "plain", kinds)
    source, name = bound(path), "model.layers.0.mlp.experts.2.gate_up_proj.weight"
    wanted = np.concatenate([values(path, f"blk.0.ffn_{part}_exps.weight")[2] for part in ("gate", "up")])
    assert np.array_equal(source.read(name).numpy(), wanted)
    assert source.decoded == {name: "MXFP4 and Q8_0"}


def test_matrices_of_latents_are_decoded(tmp_path):
    """A file has that of keys on its side, so its groups lie across the rows."""
    path = write_variant(tmp_path / "tiny.gguf", "deepseek2", "plain", {"attn_v_b.weight": "Q8_0"})
    source, name = bound(path), "model.layers.0.self_attn.kv_b_proj.weight"
    keys, of_values = values(path, "blk.0.attn_k_b.weight"), values(path, "blk.0.attn_v_b.weight")
    wanted = np.concatenate((keys.swapaxes(1, 2), of_values), 1).reshape(-1, LATENT)
    assert np.array_equal(source.read(name).numpy(), wanted)
    assert source.decoded == {name: "transposed Q8_0"}


def test_a_store_has_the_experts_codes(tmp_path):
    path = write_variant(tmp_path / "tiny.gguf", "gpt-oss", "plain", {"_exps.weight": "MXFP4"})
    report = quantize(path, tmp_path / "store")
    experts = {name: form for name, form in report.forms.items() if ".experts." in name}
    assert len(experts) == 2 * 2 * EXPERTS and set(experts.values()) == {("codebook", 32, 4)}
    assert not any(report.errors[name] for name in experts)
