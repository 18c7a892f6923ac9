"""What all directories with packed codes have in common, on a format made up for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import edit_config, edited, packed_directory
from safetensors.torch import load_file, save_file
from torch import Tensor

from mebp_triton.convert.readers.coded_matrix import CodedMatrix, even_groups
from mebp_triton.convert.readers.packed_dir import SCALES, PackedDirectory, Parts
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton

HEAD, TABLE = "lm_head", "model.embed_tokens"


class Plain(PackedDirectory):
    """A byte for a code, and one scale for a row."""

    quant_method = "plain"
    title = "plain"
    mark = "codes"
    required = ("scale",)

    def _check_settings(self) -> None:
        if self.settings.get("odd"):
            self.refuse("an odd setting")

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        codes = parts.read("codes", ("U8",), (rows, columns))
        scales = parts.read("scale", SCALES, (rows,))
        return CodedMatrix(codes, 4, scales[None], even_groups(columns, columns), columns)


def layout(module: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=random)
    scale = (torch.rand(rows, generator=random) * 0.01).half()
    return {"codes": codes, "scale": scale}, (codes.double() - 8) * scale.double()[:, None]


SETTINGS: dict[str, Any] = {"quantization_config": {"quant_method": "plain"}}


def opened(directory: Path) -> Plain:
    source = Plain(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def made(directory: Path, **options: Any) -> dict[str, Tensor]:
    return packed_directory(directory, layout, SETTINGS, **options)


def assert_reads(source: Plain, truth: dict[str, Tensor]) -> None:
    for name, weight in truth.items():
        value = source.read(f"{name}.weight")
        assert isinstance(value, Int4Weight) and torch.equal(decode(value), weight), name


def test_packed_and_float_tensors_of_one_model(tmp_path: Path) -> None:
    truth = made(tmp_path, architecture="qwen2")
    source, held = opened(tmp_path), load_file(tmp_path / "model.safetensors")
    assert source.description == f"plain directory {tmp_path.name}" and not hasattr(
        source.config, "quantization_config"
    )
    assert_reads(source, truth)
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias"):
        assert torch.equal(source.read(name), held[name])


def test_shards_may_hold_parts_of_one_module(tmp_path: Path) -> None:
    truth = made(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    shards = {"a.safetensors": ".scale", "b.safetensors": ""}
    weight_map = {}
    for name, key in ((name, key) for key in held for name, end in shards.items() if key.endswith(end)):
        weight_map.setdefault(key, name)
    for shard in shards:
        save_file({key: held[key] for key, name in weight_map.items() if name == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads(opened(tmp_path), truth)


def test_a_packed_table_may_be_the_head_too(tmp_path: Path) -> None:
    truth = made(tmp_path / "model", extra=(TABLE,))
    assert_reads(opened(tmp_path / "model"), truth)
    held = load_file(tmp_path / "model" / "model.safetensors")
    copies: dict[str, Tensor | None] = {
        f"{HEAD}.{part}": held[f"{TABLE}.{part}"].clone() for part in ("codes", "scale")
    }
    assert_reads(opened(edited(tmp_path / "model", tmp_path / "same", copies)), truth)
    other = {f"{HEAD}.scale": held[f"{TABLE}.scale"] * 2}
    with pytest.raises(ValueError, match=r"differs from .*set tie_word_embeddings to false"):
        opened(edited(tmp_path / "model", tmp_path / "other", copies | other))
    floats: dict[str, Tensor | None] = {f"{HEAD}.weight": torch.zeros(97, 96)}
    with pytest.raises(ValueError, match=r"differs from .*set tie_word_embeddings to false"):
        opened(edited(tmp_path / "model", tmp_path / "float", floats))


def test_a_module_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    made(tmp_path / "model")
    tensors: dict[str, Tensor | None] = {"odd.codes": torch.zeros(2, 2), "odd.scale": torch.zeros(2)}
    with pytest.warns(UserWarning, match=r"has no odd\.codes, odd\.scale, odd\.weight: left out"):
        opened(edited(tmp_path / "model", tmp_path / "more", tensors))


def test_a_variant_is_refused_with_the_place_and_a_way_out(tmp_path: Path) -> None:
    made(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "plain", "odd": True})
    message = r"quantization_config has an odd setting, which is not supported: give the unquantised model$"
    with pytest.raises(ValueError, match=message):
        Plain(tmp_path)
