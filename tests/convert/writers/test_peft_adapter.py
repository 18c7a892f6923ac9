"""An adapter for servers that read one rank and one scaling: what they compute is what it was trained to compute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mebp_triton.convert.readers.merged_store import Delta
from mebp_triton.convert.writers.peft_adapter import rank_limit, write_served_adapter
from mebp_triton.models.adapter import read_adapter_config
from mebp_triton.models.adapter_seal import read_adapter_tensors
from mebp_triton.store.manifest import BaseModel

BASE = BaseModel("team/model", "0123abc", 7)
LAYERS = ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v", "lm_head"]


def delta(seed: int, rank: int, scaling: float) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(rank, 12, generator=draw), torch.randn(9, rank, generator=draw), scaling)


def write(directory: Path, deltas: dict[str, Delta], **values: Any) -> tuple[int, bool]:
    directory.mkdir()
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": False, "target_modules": ".*", "bias": "none"}
    return write_served_adapter(directory, own | values, deltas, LAYERS, BASE)


def served(directory: Path) -> dict[str, torch.Tensor]:
    """What a server adds to each module: scaling and rank are those of the config."""
    config, tensors = (
        json.loads((directory / "adapter_config.json").read_text()),
        load_file(directory / "adapter_model.safetensors"),
    )
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and type(config["lora_alpha"]) is int
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    paths = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    parts = {path: [tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB"] for path in paths}
    assert all(a.shape[0] == b.shape[1] == config["r"] for a, b in parts.values())
    return {path: scaling * b @ a for path, (a, b) in parts.items()}


@pytest.mark.parametrize(
    ("forms", "config", "made"),
    [
        ([(4, 1.5), (4, 1.5)], {}, (4, False)),
        ([(4, 3.0), (4, 3.0)], {"use_rslora": True}, (4, False)),
        ([(4, 1.5), (2, 3.0)], {"rank_pattern": {"v": 2}}, (4, True)),
        ([(4, 1.5), (4, 0.0)], {"alpha_pattern": {"v": 0}}, (4, True)),
        ([(4, 0.5), (4, 0.5)], {"alpha_pattern": {".*": 2}}, (4, False)),
        ([(6, 0.0), (6, 0.0)], {"r": 6, "lora_alpha": 0}, (6, False)),
    ],
)
def test_a_server_computes_what_was_trained(tmp_path: Path, forms: Any, config: Any, made: Any) -> None:
    deltas = {f"blocks.{i}.{name}": delta(i, *form) for i in (0, 1) for name, form in zip("qv", forms, strict=True)}
    assert write(tmp_path / "a", deltas, **config) == made
    found = served(tmp_path / "a")
    for path, (a, b, scaling) in deltas.items():
        assert torch.allclose(found.pop(path), scaling * b @ a, rtol=1e-5, atol=1e-6), path
    assert not found
    # It is one of our own adapters too, sealed.
    assert read_adapter_config(tmp_path / "a").rank("blocks.0.q") == made[0]
    assert len(read_adapter_tensors(tmp_path / "a")) == 8


def test_the_config_names_base_and_modules(tmp_path: Path) -> None:
    write(tmp_path / "a", {path: delta(0, 2, 1.0) for path in ("blocks.0.q", "blocks.1.q")})
    write(tmp_path / "b", {"blocks.0.q": delta(0, 2, 1.0)})
    config, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert (config["base_model_name_or_path"], config["revision"]) == ("team/model", "0123abc")
    assert config["target_modules"] == ["q"] and other["target_modules"] == ["blocks.0.q"]


def test_weights_that_were_targets_become_modules_and_unknown_layers_are_not_targeted(tmp_path: Path) -> None:
    """PEFT would adapt such a weight a second time; and a model for images may have a "q" in its other parts."""
    write(tmp_path / "a", {path: delta(0, 2, 1.0) for path in LAYERS[::2]}, target_parameters=["q.weight"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    (tmp_path / "b").mkdir()
    values = {"r": 2, "lora_alpha": 2}
    write_served_adapter(tmp_path / "b", values, {path: delta(0, 2, 1.0) for path in LAYERS[:4]}, None, BASE)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == LAYERS[:4]


def test_ranks_have_a_limit(tmp_path: Path) -> None:
    assert [rank_limit(rank) for rank in (1, 8, 9, 300, 512)] == [8, 8, 16, 320, 512]
    with pytest.raises(ValueError, match="has rank 513, and vLLM serves 512 at most"):
        write(tmp_path / "a", {"blocks.0.q": delta(0, 513, 1.0)})
