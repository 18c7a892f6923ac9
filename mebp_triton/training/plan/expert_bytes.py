"""The bytes of experts that a block brings in, which depend on where its router sends the tokens of a step."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from mebp_triton.store.manifest import block_file

from .inventory import Inventory, nbytes
from .traced_model import TracedModel


@dataclass(frozen=True)
class ExpertBytes:
    """The bytes of a block's experts.

    Attributes:
        every: of all.
        expected: of those that tokens are sent to if each chooses its experts at random, in the mean.
        most: of those that they can be sent to at most. A memory budget counts them.
    """

    every: int = 0
    expected: int = 0
    most: int = 0


def expert_bytes(inventory: Inventory, model: TracedModel, pass_tokens: int, tokens: int) -> list[ExpertBytes]:
    """The experts of every block of the whole model.

    Args:
        model: has traced a step.
        pass_tokens: how many tokens went through a block at once then.
        tokens: how many do while the block's weights are in place.
    """
    sizes: dict[str, int] = defaultdict(int)  # by the module, over all of its experts
    files: dict[str, str] = {}
    for name, parameter in model.expert_parameters.items():
        module, info = parameter.rpartition(".")[0], inventory.matrices[name]
        sizes[module] += sum(map(nbytes, info.tensors().values()))
        files[module] = info.file
    found = []
    for index, kind in enumerate(model.kinds):
        traced = model.kinds.index(kind)  # the block that stands for this one
        blocks = [ExpertBytes()]
        for module, size in sizes.items():
            if files[module] == block_file(index):
                own = f"{model.path}.{traced}.{module.removeprefix(f'{model.path}.{index}.')}"
                experts = model.experts[own]
                blocks.append(of_module(size, experts.count, experts.pairs / pass_tokens, tokens))
        found.append(ExpertBytes(*map(sum, zip(*((b.every, b.expected, b.most) for b in blocks), strict=True))))
    return found


def of_module(size: int, count: int, per_token: float, tokens: int) -> ExpertBytes:
    """The bytes of ``count`` experts of ``size`` bytes in all, of which each of ``tokens`` chooses ``per_token``."""
    chosen = count * (1 - (1 - min(1.0, per_token / count)) ** tokens)
    most = min(count, math.ceil(per_token * tokens))
    return ExpertBytes(size, round(size * chosen / count), size * most // count)
