"""Tiny sources and random rows of tokens for them, as calibration and the loss of a source take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import save_tiny_model
from transformers import AutoModelForCausalLM

from mebp_triton.convert.calibration.source_run import SourceRun
from mebp_triton.convert.readers import open_source
from mebp_triton.data.tokenized import RowWriter, TokenizedData
from mebp_triton.models.skeleton import build_skeleton


def random_rows(count: int = 3, length: int = 20, seed: int = 0, vocabulary: int = 97) -> TokenizedData:
    """Rows of several lengths, in each of which the first third is not trained."""
    generator, writer = torch.Generator().manual_seed(seed), RowWriter(length)
    for row in range(count):
        ids = torch.randint(3, vocabulary, (length - row,), generator=generator).tolist()
        masked = len(ids) // 3
        writer.add(ids, b"\0" * masked + b"\1" * (len(ids) - masked))
    return writer.finish()


def opened_source(directory: Path) -> Any:
    """The source in ``directory``, bound."""
    source = open_source(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def source_run(root: Path, architecture: str, data: TokenizedData | None = None, **config: Any) -> SourceRun:
    """A run of a tiny model, which lies in ``root / "model"``."""
    source = opened_source(save_tiny_model(architecture, root / "model", **config))
    return SourceRun(source, random_rows() if data is None else data, None, root)


def whole_model(root: Path) -> Any:
    """The same model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
