"""Compares every value that we read of 4-bit model directories with what the tools that made them decode.

Each tool quantises a tiny random Llama in every variant; the directories are read as ``mebp quantize`` reads them. The
tools need environments of their own, beside this package:

    python bench/foreign_formats.py compressed-tensors   # pip install compressed-tensors llmcompressor
    python bench/foreign_formats.py mlx                  # pip install mlx mlx-cpu
    python bench/foreign_formats.py gptqmodel            # pip install gptqmodel; set GPTQMODEL_CPU_WORKERS=2
    python bench/foreign_formats.py auto-round           # pip install auto-round
    python bench/foreign_formats.py hqq                  # pip install hqq

Prints a line of JSON for each variant. ``differ`` counts the values that are not equal in the reference's dtype.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from mebp_triton.convert.readers import open_source
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton

CONFIG = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
# The name of a variant, its directory, and what the tool decodes: weights by module.
Variant = tuple[str, Path, dict[str, Tensor]]


def random_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG), dtype=dtype).eval()


def linear_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def compared(directory: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Counts of values, of those that differ, and of matrices by what became of them."""
    source = open_source(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    values = differ = 0
    forms: Counter[str] = Counter()
    for module, wanted in reference.items():
        read = source.read(f"{module}.weight")
        exact = isinstance(read, Int4Weight)
        forms[f"{read.form}, scales {read.scales.dtype}" if exact else "decoded"] += 1
        ours = (decode(read, torch.float32) if exact else read).to(wanted.dtype)
        values += wanted.numel()
        differ += int((ours != wanted).sum())
    return {
        "values": values,
        "differ": differ,
        "matrices": dict(forms),
        "decoded": sorted(set(source.decoded.values())),
    }


def of_compressed_tensors(root: Path) -> Iterator[Variant]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file

    ways: dict[str, Any] = {f"{name} {dtype}": name for name in ("W4A16", "W4A16_ASYM", "MXFP4A16") for dtype in "bf"}
    ways |= {"W8A16 b": "W8A16"}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}
    ways |= {"channel, not symmetric b": QuantizationScheme(targets=["Linear"], weights=weights)}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    ways |= {"groups of 32 f": QuantizationScheme(targets=["Linear"], weights=weights)}
    for number, (name, scheme) in enumerate(ways.items()):
        dtype = torch.bfloat16 if name.endswith("b") else torch.float16
        random_model(dtype).save_pretrained(root / "float")
        model, directory = AutoModelForCausalLM.from_pretrained(root / "float", dtype=dtype), root / str(number)
        scheme = preset_name_to_scheme(scheme, ["Linear"]) if isinstance(scheme, str) else scheme
        oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]))
        model.save_pretrained(directory, save_compressed=True)
        stated = json.loads((directory / "config.json").read_text())["quantization_config"]
        held, reference = load_file(directory / "model.safetensors"), {}
        compressor = BaseCompressor.get_value_from_registry(stated["format"])
        for module in linear_layers(model):
            parts = {
                key.removeprefix(f"{module}."): tensor for key, tensor in held.items() if key.startswith(f"{module}.")
            }
            reference[module] = compressor.decompress(parts, scheme)["weight"]
        yield name, directory, reference


def of_mlx(root: Path) -> Iterator[Variant]:
    import mlx.core as mx

    ways = [
        (bits, size, dtype)
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
        for dtype in ("float16", "bfloat16")
    ]
    for number, (bits, size, dtype) in enumerate([*ways, (4, 32, "mxfp4")]):
        model, directory = random_model(torch.float32), root / str(number)
        model.config.save_pretrained(directory)
        settings = {"group_size": size, "bits": bits} | ({"mode": "mxfp4"} if dtype == "mxfp4" else {})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization": settings}))
        tensors, reference = {}, {}
        for key, tensor in model.state_dict().items():
            array = mx.array(tensor.numpy()).astype(mx.bfloat16 if dtype == "mxfp4" else getattr(mx, dtype))
            module = key.removesuffix(".weight")
            if tensor.dim() < 2:
                tensors[key] = array
                continue
            mode = {"mode": "mxfp4"} if dtype == "mxfp4" else {}
            parts = mx.quantize(array, group_size=size, bits=bits, **mode)
            tensors |= {
                f"{module}.{part}": each for part, each in zip(("weight", "scales", "biases"), parts, strict=False)
            }
            wide = parts if mode else (parts[0], *(each.astype(mx.float32) for each in parts[1:]))
            decoded = mx.dequantize(*wide, group_size=size, bits=bits, **mode).astype(mx.float32)
            reference[module] = torch.from_numpy(np.array(decoded))
        mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "mlx"})
        yield f"{bits} bits, groups of {size}, {dtype}", directory, reference


def of_gptqmodel(root: Path) -> Iterator[Variant]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from runs import word_tokenizer
    from safetensors.torch import load_file

    random_model(torch.float16).save_pretrained(root / "float")
    word_tokenizer().save_pretrained(root / "float")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 250, (64,), generator=generator).tolist()} for _ in range(64)]
    rows = [row | {"attention_mask": [1] * 64} for row in rows]
    ways: dict[str, dict[str, Any]] = {
        "gptq symmetric 128": {"group_size": 128, "sym": True},
        "gptq symmetric 32": {"group_size": 32, "sym": True},
        "gptq symmetric, rows": {"group_size": -1, "sym": True, "act_group_aware": False},
        "gptq 128": {"group_size": 128, "sym": False},
        "gptq version 2, 64": {"group_size": 64, "sym": False, "format": "gptq_v2"},
        "gptq act-order 64": {"group_size": 64, "sym": True, "desc_act": True},
        "gptq static groups 64": {"group_size": 64, "sym": True, "desc_act": True, "static_groups": True},
        "gptq 8 bits 32": {"group_size": 32, "sym": False, "bits": 8},
        "gptq 3 bits 32": {"group_size": 32, "sym": True, "bits": 3},
        "gptq 2 bits 32": {"group_size": 32, "sym": False, "bits": 2},
        "gptq dynamic 32": {"group_size": 32, "sym": True, "dynamic": {r".*down_proj.*": {"bits": 8}}},
        "awq 128": {"group_size": 128, "quant_method": "awq", "format": "gemm", "sym": False},
        "awq 64": {"group_size": 64, "quant_method": "awq", "format": "gemm", "sym": False},
        "awq symmetric 32": {"group_size": 32, "quant_method": "awq", "format": "gemm"},
    }
    for number, (name, options) in enumerate(ways.items()):
        config = QuantizeConfig(**({"bits": 4, "desc_act": False, "offload_to_disk": False} | options))
        directory, reference = root / str(number), {}
        model = GPTQModel.load(str(root / "float"), config, dtype=torch.float16, device="cpu")
        model.quantize(rows, batch_size=4)
        model.save(str(directory))
        if name.startswith("awq"):
            held, size = load_file(directory / "model.safetensors"), options["group_size"]
            for key in [key.removesuffix(".qweight") for key in held if key.endswith(".qweight")]:
                parts = (held[f"{key}.{part}"] for part in ("qweight", "qzeros", "scales"))
                reference[key] = dequantize_gemm(*parts, 4, size).t()
        else:
            loaded = GPTQModel.load(str(directory), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
            for key, module in linear_layers(loaded.model).items():
                reference[key] = module.dequantize_weight().t()
        yield name, directory, reference


def of_auto_round(root: Path) -> Iterator[Variant]:
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
    from runs import word_tokenizer
    from safetensors.torch import load_file

    random_model(torch.float16).save_pretrained(root / "float")
    word_tokenizer().save_pretrained(root / "float")
    classes = {"auto_round:auto_gptq": qlinear_torch_zp.QuantLinear, "auto_round": qlinear_torch.QuantLinear}
    forms = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round")
    for number, (form, sym, size) in enumerate(itertools.product(forms, (True, False), (32, 128))):
        model = AutoModelForCausalLM.from_pretrained(root / "float", dtype=torch.float16)
        shapes = {name: layer.weight.shape for name, layer in linear_layers(model).items()}
        options = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "bits": 4, "group_size": size, "sym": sym}
        AutoRound(model, word_tokenizer(), **options).quantize_and_save(str(root / str(number)), format=form)
        directory = next(root.joinpath(str(number)).rglob("config.json")).parent
        stated = json.loads((directory / "config.json").read_text())["quantization_config"]["packing_format"]
        held, reference = load_file(directory / "model.safetensors"), {}
        for module, (rows, columns) in shapes.items():
            names = ("qweight", "qzeros", "scales")
            parts = {part: held[f"{module}.{part}"] for part in names}
            if "awq" in stated:
                reference[module] = dequantize_gemm(*parts.values(), 4, size).t()
            else:
                layer = classes[stated](4, size, columns, rows, bias=False)
                layer.load_state_dict(parts, strict=False)
                # It decodes inside of its product: with the identity, that is the weight.
                reference[module] = layer(torch.eye(columns).half()).t()
        yield f"{form} ({stated}), {'symmetric' if sym else 'affine'}, {size}", directory, reference


def of_hqq(root: Path) -> Iterator[Variant]:
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer
    from hqq.models.hf.base import AutoHQQHFModel

    ways = [
        (4, 64, 1, torch.float16),
        (4, 32, 1, torch.bfloat16),
        (4, 128, 1, torch.float16),
        (2, 32, 1, torch.float16),
    ]
    for number, (bits, size, axis, dtype) in enumerate([*ways, (8, 64, 1, torch.float16), (4, 64, 0, torch.float16)]):
        model, directory = random_model(dtype), root / str(number)
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
        AutoHQQHFModel.save_to_safetensors(model, str(directory))
        reference = {}
        for name, layer in linear_layers(model).items():
            # HQQ's own decoding rounds twice to the model's dtype: here the same is done in float64, and rounded once.
            codes = Quantizer.unpack[layer.meta["packing"]](layer.W_q).double()
            exact = (codes - layer.meta["zero"].double()) * layer.meta["scale"].double()
            reference[name] = exact.view(layer.meta["shape"]).float()
        yield f"{bits} bits, groups of {size}, axis {axis}, {dtype}", directory, reference


TOOLS = {
    "compressed-tensors": of_compressed_tensors,
    "mlx": of_mlx,
    "gptqmodel": of_gptqmodel,
    "auto-round": of_auto_round,
    "hqq": of_hqq,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    tool = parser.parse_args().tool
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)  # some tools leave logs where they run
        for name, directory, reference in TOOLS[tool](Path(root)):
            found = {"tool": f"{tool} {version(tool)}", "variant": name} | compared(directory, reference)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
