"""What stays float is counted by its reason, and said where it matters."""

from __future__ import annotations

import pytest
import torch
from models import tiny_config

from mebp_triton.models.kept_float import (
    EXPERTS,
    OTHERS,
    READ,
    ROUTERS,
    TABLES,
    KeptFloat,
    describe_kept_float,
    kept_float,
)
from mebp_triton.models.skeleton import build_skeleton, float_names, int4_sites


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {}),
        ("gpt2", {TABLES: KeptFloat(1, 64 * 48 * 4)}),
        (
            "llama4_text",
            {EXPERTS: KeptFloat(3 * 4 * 2, 3 * 4 * 3 * 80 * 48 * 4), ROUTERS: KeptFloat(3, 3 * 4 * 48 * 4)},
        ),
        ("gemma3n_text", {READ: KeptFloat(6, 3 * (4 + 8) * 4), TABLES: KeptFloat(1, 97 * 48 * 4)}),
        ("mamba", {READ: KeptFloat(9, 3 * (19 * 96 + 96 * 3 + 48 * 96) * 4), OTHERS: KeptFloat(3, 3 * 96 * 8 * 4)}),
        ("lfm2", {}),
    ],
)
def test_every_matrix_that_stays_float_is_counted(architecture: str, wanted: dict[str, KeptFloat]) -> None:
    model = build_skeleton(tiny_config(architecture), torch.float32)
    sizes = {name: model.get_parameter(name).nbytes for name in float_names(model, int4_sites(model)[0])}
    assert kept_float(model, sizes) == wanted


def test_lines_have_counts_bytes_and_the_share() -> None:
    counts = {EXPERTS: KeptFloat(24, 3 << 20), ROUTERS: KeptFloat(3, 1000), READ: KeptFloat(1, 10)}
    assert describe_kept_float(counts, 4 << 20) == [
        "24 matrices stay float (experts that share a tensor in a form of their own): 3.0 MiB, 75 % of the store",
        "1 matrix stays float (layers whose weight the modelling code reads itself): 0.0 MiB, 0 % of the store",
    ]
