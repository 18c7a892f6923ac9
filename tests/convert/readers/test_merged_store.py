"""A store and its adapter are read as one checkpoint: what is stored, what is merged, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import loaded
from safetensors.torch import load_file, save_file

import mebp_triton as mebp
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.reader import Store

LORA = {"r": 4, "lora_alpha": 12, "rank_pattern": {"v_proj": 2, "c_attn": 2}, "target_modules": r".*(v_proj|c_attn)"}
NAMES = {"llama": "model.layers.1.self_attn.v_proj", "gpt2": "transformer.h.1.attn.c_attn"}
PLAIN = {"llama": "model.layers.1.self_attn.k_proj", "gpt2": "transformer.h.1.mlp.c_fc"}


@pytest.fixture(scope="module")
def adapters(shared_store: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter on one layer of each block, by architecture."""
    directories = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, directory in directories.items():
        mebp.save_adapter(loaded(shared_store(name), LORA), directory)
    return directories


def bound(store: Path, adapter: Path | None = None, **options: Any) -> MergedStore:
    source = MergedStore(store, adapter, **options)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def merged(store: Path, adapter: Path, name: str) -> torch.Tensor:
    """``W + scaling * B @ A`` in float64, ``[out, in]``."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    return decode(Store(store).weight(name)) + 12 / 2 * b @ a


@pytest.mark.parametrize("architecture", NAMES)
def test_matrices_are_merged_where_the_adapter_is(shared_store: Any, adapters: Any, architecture: str) -> None:
    store, adapter = shared_store(architecture), adapters[architecture]
    source, opened = bound(store, adapter), Store(store)
    name, plain = f"{NAMES[architecture]}.weight", f"{PLAIN[architecture]}.weight"
    truth = merged(store, adapter, NAMES[architecture])
    truth = truth.t() if architecture == "gpt2" else truth
    found = source.read(name)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    assert torch.allclose(found.double(), truth, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat(list(source.pieces(name))), found)
    # Matrices that the adapter leaves alone come as they are stored.
    kept = source.read(plain)
    assert isinstance(kept, Int4Weight) and torch.equal(kept.packed, opened.weight(PLAIN[architecture]).packed)
    assert torch.equal(torch.cat(list(source.pieces(plain))).t() if architecture == "gpt2" else
                       torch.cat(list(source.pieces(plain))), decode(kept, torch.float32))  # fmt: skip
    float_name = next(iter(opened.floats))
    assert torch.equal(source.read(float_name), opened.float_tensor(float_name))
    assert source.has(name) and source.has(float_name) and not source.has("nothing")
    assert source.dtype(name) is None and source.dtype(float_name) == torch.float32


@pytest.mark.parametrize("architecture", NAMES)
def test_pieces_of_a_few_rows_give_the_same(shared_store: Any, adapters: Any, architecture: str) -> None:
    store, adapter = shared_store(architecture), adapters[architecture]
    whole, few = bound(store, adapter), bound(store, adapter, piece_elements=300)
    for module in (NAMES[architecture], PLAIN[architecture]):
        one, two = (torch.cat(list(source.pieces(f"{module}.weight"))) for source in (whole, few))
        assert torch.equal(one, two), module
    name = f"{NAMES[architecture]}.weight"
    assert torch.equal(few.read(name), whole.read(name))  # type: ignore[arg-type]
    table = next(name for name in few.store.matrices if "embed" in name or "wte" in name)
    assert [len(piece) for piece in few.pieces(f"{table}.weight")] == [6] * 16 + [1], "97 rows of 48"
    assert [len(piece) for piece in whole.pieces(f"{table}.weight")] == [97]


def test_the_config_tells_the_dtype_that_is_saved(shared_store: Any, adapters: Any, tmp_path: Path) -> None:
    source = MergedStore(shared_store("llama"), adapters["llama"])
    assert source.description == f"safetensors directory model, merged with adapter {adapters['llama'].name}"
    source.save_as("float16", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float16" and "torch_dtype" not in config
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "manifest.json").exists()
    source.save_companions(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_a_damaged_store_is_seen_when_it_is_read(shared_store: Any, tmp_path: Path) -> None:
    store = Path(shutil.copytree(shared_store("llama"), tmp_path / "store"))
    data = bytearray((store / SHARED).read_bytes())
    data[-1] ^= 1
    (store / SHARED).write_bytes(data)
    source = bound(store)
    for read in (source.read, lambda name: list(source.pieces(name))):
        with pytest.raises(ValueError, match="is damaged: checksum"):
            read("model.embed_tokens.weight")


def test_layers_that_share_a_weight(shared_store: Any, tmp_path: Path) -> None:
    """Each may have an adapter, and then one weight cannot be both. Alone, they are read by any of their names."""
    store = shared_store("zamba2")
    source = bound(store)
    first, second = (f"model.layers.{index}.shared_transformer.self_attn.q_proj.weight" for index in (0, 2))
    assert torch.equal(decode(source.read(first)), decode(source.read(second)))
    norm = "model.layers.2.shared_transformer.input_layernorm.weight"
    assert source.has(norm) and torch.equal(source.read(norm), next(iter(source.pieces(norm))))
    mebp.save_adapter(loaded(store, LORA | {"target_modules": ["q_proj"]}), tmp_path / "adapter")
    with pytest.raises(ValueError, match="share one weight and have an adapter each: .*; use the adapter by PEFT"):
        bound(store, tmp_path / "adapter")


# --- adapters that do not fit ---------------------------------------------------------------------------------------

A = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
HEAD = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
TABLE = "base_model.model.model.embed_tokens.lora"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {A: None}, f"lacks {A}"),
        ({}, {A: torch.ones(2, 47)}, r"has shape \(2, 47\), wanted \(2, 48\)"),
        ({}, {A: torch.full((2, 48), float("nan"))}, "is not finite"),
        ({}, HEAD, "has base_model.model.lm_head.lora_A.weight and 1 more"),
        ({"target_modules": ["q_proj"]}, {}, "does not fit this model: it lacks .*q_proj"),
        (
            {"target_modules": ["v_proj", "embed_tokens"]},
            {f"{TABLE}_A.weight": torch.ones(4, 48), f"{TABLE}_B.weight": torch.ones(97, 4)},
            "does not fit this model: it has .*embed_tokens",
        ),
        ({"rank_pattern": {}}, {}, r"has rank 4 by its config, and .* has shape \(2, 48\)"),
        ({"use_dora": True}, {}, "use_dora"),
    ],
)
def test_an_adapter_that_does_not_fit(
    shared_store: Any, adapters: Any, tmp_path: Path, config: Any, tensors: Any, words: str
) -> None:
    wrong = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter"))
    path = wrong / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    values = load_file(wrong / "adapter_model.safetensors") | tensors
    # Saved again without our checksum, as PEFT does it.
    save_file({k: v for k, v in values.items() if v is not None}, wrong / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        bound(shared_store("llama"), wrong)
    assert "\n" not in str(caught.value)
