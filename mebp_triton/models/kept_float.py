"""Says which matrices of a model stay float, and why: experts, say, may be most of its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from mebp_triton.system.units import MIB

from .direct_reads import directly_read
from .skeleton import kept_modules

EXPERTS = "experts that share a tensor in a form of their own"
READ = "layers whose weight the modelling code reads itself"
ROUTERS = "routers and what transformers keeps in float32"
TABLES = "embeddings beside that of the input"
OTHERS = "parameters of other layers"


@dataclass
class KeptFloat:
    """The matrices that stay float for one reason: how many, and their bytes."""

    matrices: int = 0
    bytes: int = 0


def kept_float(model: nn.Module, sizes: Mapping[str, int]) -> dict[str, KeptFloat]:
    """Counts the matrices of ``model`` that stay float, by the reason. Convolutions and vectors are not counted.

    Args:
        model: a transformers model, whose parameters may be on the meta device.
        sizes: the bytes of the tensors that are float in its store, by name.
    """
    kept, read = kept_modules(model), directly_read(model)
    modules = dict(model.named_modules())
    counts: dict[str, KeptFloat] = {}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        module = modules[path]
        if name not in sizes or parameter.dim() < 2 or isinstance(module, _ConvNd):
            continue
        if parameter.dim() > 2:
            reason = EXPERTS
        elif isinstance(module, nn.Embedding):
            reason = TABLES
        elif isinstance(module, nn.Linear | Conv1D) and path in read:
            reason = READ
        else:
            reason = ROUTERS if kept(path) else OTHERS
        count = counts.setdefault(reason, KeptFloat())
        count.matrices += prod(parameter.shape[:-2])
        count.bytes += sizes[name]
    return counts


def describe_kept_float(counts: Mapping[str, KeptFloat], total: int) -> list[str]:
    """A line for each reason why matrices stay float, unless they are less than 1 % of the store's ``total`` bytes."""
    lines = []
    for reason, count in counts.items():
        share = 100 * count.bytes / max(1, total)
        if share >= 1 or reason == READ:
            what = "1 matrix stays" if count.matrices == 1 else f"{count.matrices} matrices stay"
            lines.append(f"{what} float ({reason}): {count.bytes / MIB:.1f} MiB, {share:.0f} % of the store")
    return lines
