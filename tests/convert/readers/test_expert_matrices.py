"""An expert's matrix from pieces that have codes: they are joined as they are, if they can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny_config
from packed_layouts import awq, gptq
from packed_models import assert_exact, packed_directory
from stores import int4

from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers.conversions import Conversion, conversions
from mebp_triton.convert.readers.expert_matrices import ExpertMatrices, join_rows
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.kernels.reference import decode
from mebp_triton.models.names import current_names
from mebp_triton.models.skeleton import build_skeleton

needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_every_form_are_joined(form: Form) -> None:
    first, second = (int4(form.scheme, seed, 6, 200, form.group_size, bits=form.bits) for seed in (1, 2))
    second = replace(second, codebook=first.codebook)
    joined = join_rows([first, second])
    assert joined is not None and joined.form == form
    assert torch.equal(
        decode(joined, torch.float32), torch.cat([decode(one, torch.float32) for one in (first, second)])
    )


def test_what_differs_in_kind_is_not_joined() -> None:
    first = int4("symmetric", 1, 6, 128)
    assert join_rows([first, int4("affine", 1, 6, 128)]) is None
    assert join_rows([first, int4("symmetric", 1, 6, 128, dtype=torch.float32)]) is None
    assert join_rows([int4("codebook", 1, 6, 128), int4("codebook", 2, 6, 128)]) is None  # two codebooks


class _Files:
    """Pieces of which the gate has other codes than up."""

    path = "the files"

    def __init__(self, pieces: dict[str, Int4Weight]) -> None:
        self.pieces = pieces

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Any:
        assert self.pieces[key].shape == shape and name == "model.layers.0.mlp.experts.1.gate_up_proj.weight"
        return self.pieces[key]


@needs_5
@pytest.mark.parametrize("alike", [True, False])
def test_pieces_with_codes(alike: bool) -> None:
    """Other codes are decoded, and joined as floats."""
    model = build_skeleton(tiny_config("qwen3_moe", num_hidden_layers=1, num_experts=2), torch.float32)
    names = [
        f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight" for expert in range(2) for kind in ("gate", "up")
    ]
    up: Any = "symmetric" if alike else "affine"
    pieces = {name: int4("symmetric" if "gate" in name else up, seed, 40, 48, 32) for seed, name in enumerate(names)}
    made: dict[str, Conversion] = conversions(model, current_names(model, names))
    files: Any = _Files(pieces)
    experts = ExpertMatrices(files, model, {}, made)
    value = experts.read("model.layers.0.mlp.experts.1.gate_up_proj.weight")
    truth = torch.cat([decode(pieces[name], torch.float32) for name in names[2:]])
    assert isinstance(value, Int4Weight) == alike
    assert torch.equal(decode(value, torch.float32) if isinstance(value, Int4Weight) else value, truth)


LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
}


@needs_5
@pytest.mark.parametrize("method", LAYOUTS)
def test_experts_of_directories_with_codes_are_taken_over(method: str, tmp_path: Path) -> None:
    """Gate and up become one matrix, to the bit."""
    layout, settings = LAYOUTS[method]
    pieces = [
        f"model.layers.{block}.mlp.experts.{expert}.{kind}_proj"
        for block in range(2)
        for expert in range(3)
        for kind in ("gate", "up", "down")
    ]
    model = tmp_path / "model"
    truth = packed_directory(model, layout, {"quantization_config": settings}, "qwen3_moe", extra=tuple(pieces))
    report = quantize(model, tmp_path / "store")
    for gate in [name for name in pieces if name.endswith("gate_proj")]:
        expert = gate.rpartition(".")[0]
        up, down = truth.pop(f"{expert}.up_proj"), truth[f"{expert}.down_proj"]
        truth[f"{expert}.gate_up_proj"] = torch.cat((truth.pop(gate), up))
        assert down.shape == (96, 40)
    assert set(report.taken_over) == truth.keys() and not report.decoded
    assert_exact(tmp_path / "store", truth, "affine", None, {32})
