"""Tells a launch over a mixture's experts where their rows and weights lie: a table on the device, and offsets.

The table says for each tile of tokens where its rows begin and its expert's end, which expert that is, and where in
their storage the tensors of the expert's weight lie. The host makes it: it knows how many rows each expert has, since
it had to bring these weights in. Nobody waits for the copy to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Kernel, Problem, TileConfig, power_of_two_at_least
from .launch import MOST_KNOWN, check_operand, runs_compiled, stride_of
from .layout import TENSORS, Int4Weight

# Columns of a table: a tile's first row, the end of its expert's rows, the expert, and the places of its tensors.
FIRST, END, EXPERT, PACKED, SCALES, MINIMUM, CODEBOOK, SUPER_SCALES, SUPER_MINIMUM, COLUMNS = map(
    tl.constexpr, range(10)
)
ALIGNMENT = 16  # bytes: the most that a thread reads at once


@triton.jit
def of_expert(tensors, row_ptr, HAS_MINIMUM: tl.constexpr, HAS_CODEBOOK: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensors of a tile's expert, as ``weight_of`` takes those of a group of one; and its codebook.

    What is not there has the scales in its place.
    """
    packed_ptr = _at(tensors[0], row_ptr + PACKED, ALIGNED)
    scales_ptr = _at(tensors[1], row_ptr + SCALES, ALIGNED)
    minimum_ptr, super_scales_ptr, super_minimum_ptr, codebook_ptr = scales_ptr, scales_ptr, scales_ptr, scales_ptr
    if HAS_MINIMUM:
        minimum_ptr = _at(tensors[2], row_ptr + MINIMUM, ALIGNED)
    if scales_ptr.dtype.element_ty == tl.int8:
        super_scales_ptr = _at(tensors[4], row_ptr + SUPER_SCALES, ALIGNED)
        if HAS_MINIMUM:
            super_minimum_ptr = _at(tensors[5], row_ptr + SUPER_MINIMUM, ALIGNED)
    if HAS_CODEBOOK:
        codebook_ptr = _at(tensors[3], row_ptr + CODEBOOK, ALIGNED)
    return ((packed_ptr,), (scales_ptr,), (minimum_ptr,), (super_scales_ptr,), (super_minimum_ptr,)), codebook_ptr


@triton.jit
def _at(base_ptr, place_ptr, ALIGNED: tl.constexpr):
    """The tensor that lies at a place of a storage."""
    ptr = base_ptr + tl.load(place_ptr)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


class Experts:
    """Weights that one launch takes, each with rows of its own: they are alike, and lie in one storage.

    Args:
        weights: which differ in nothing but their places.

    Attributes:
        head: the first of them. count: how many they are.
        tensors: their storage as the kernels take it, flat, in the dtype of each of a weight's tensors.
        places: ``[weights, tensors]`` int64 on the CPU: where each weight's tensors begin, in elements.
        aligned: whether all tensors begin at multiples of ALIGNMENT.
        key: what a launch follows from, besides the operands.

    Raises:
        ValueError: they differ in more, or have several storages.
    """

    def __init__(self, weights: Sequence[Int4Weight]) -> None:
        described = [_description(weight) for weight in weights]
        kind = described[0][0]
        if len(kind[-1]) > 1 or any(one[0] is not kind and one[0] != kind for one in described):
            raise ValueError(f"{len(weights)} weights of several kinds or storages cannot share a launch")
        self.head, self.count = weights[0], len(weights)
        parts = [getattr(self.head, name) for name in TENSORS]
        self.tensors = tuple(None if part is None else _storage_of(part) for part in parts)
        self.places = torch.tensor([places for _, places, _ in described])
        self.aligned = all(aligned for _, _, aligned in described)
        self.key = kind, self.aligned

    def check(
        self,
        rows: Sequence[int],
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        given: Tensor,
        low: Tensor | None,
        high: Tensor | None,
    ) -> None:
        """Raises ValueError unless the operands fit; the shapes are theirs, of LoRA's without the rank."""
        device = self.head.device
        if len(rows) != self.count:
            raise ValueError(f"rows must have a number for each of {self.count} weights, got {len(rows)}")
        check_operand(names[0], given, shapes[0], device)
        if (low is None) != (high is None):
            raise ValueError(f"{names[1]} and {names[2]} go together, got one without its partner")
        if low is not None and high is not None:
            check_operand(names[1], low, (*shapes[1], low.shape[-1]), device)
            check_operand(names[2], high, (*shapes[2], low.shape[-1]), device)

    def problem(self, kernel: Kernel, tokens: int, dtype: torch.dtype) -> Problem:
        """The problem that a configuration is chosen for: one weight with the outputs of all, and an expert's tokens.

        It has as many tiles as the experts have together, if tokens are spread evenly, and as many bytes of weights.
        """
        n, k = self.head.shape
        n, k = (n * self.count, k) if kernel == "matmul" else (n, k * self.count)
        head = self.head
        return Problem(kernel, -(-tokens // self.count), n, k, head.scheme, head.group_size, dtype, head.bits)

    def arguments(self, config: TileConfig, kernel: Any) -> dict[str, Any]:
        """The arguments of a kernel that follow from the weights and the configuration, by name."""
        head = self.head
        scales = [getattr(head, name) for name in ("scales", "minimum", "super_scales", "super_minimum")]
        return {
            "N": head.out_features,
            "K": head.in_features,
            "strides": (head.packed.stride(), *[((stride_of(one, 0),), stride_of(one, 1)) for one in scales]),
            "FORM": (head.bits, head.group_size, head.minimum is not None),
            "HAS_CODEBOOK": head.codebook is not None,
            "ALIGNED": self.aligned,
            "ASM": runs_compiled(kernel),
            "STAGES": config.num_stages,
            "THREADS": 32 * config.num_warps,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        }

    def table(self, rows: Sequence[int], block_m: int) -> Tensor:
        """The table of a launch with tiles of ``block_m`` tokens, on the weights' device."""
        counts = torch.tensor(rows)
        tiles, ends = -(-counts // block_m), counts.cumsum(0)
        expert = torch.arange(self.count).repeat_interleave(tiles)
        within = torch.arange(len(expert)) - (tiles.cumsum(0) - tiles)[expert]
        own = torch.stack(((ends - counts)[expert] + within * block_m, ends[expert], expert), dim=1)
        table = torch.cat((own, self.places[expert]), dim=1)
        device = self.head.device
        return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _storage_of(part: Tensor) -> Tensor:
    """The whole storage of a tensor, flat, in the tensor's dtype."""
    if part.device.type == "meta":
        return part
    storage = part.untyped_storage()
    return part.new_empty(0).set_(storage, 0, (storage.nbytes() // part.element_size(),))


# What was found out about weights, for as long as they are there: every launch asks, and there may be hundreds.
_DESCRIBED: WeakKeyDictionary[Int4Weight, tuple[Any, list[int], bool]] = WeakKeyDictionary()
# Each kind once, so that those of hundreds of weights are compared at once.
_KINDS: dict[Any, Any] = {}


def _description(weight: Int4Weight) -> tuple[Any, list[int], bool]:
    """All of a weight that alike ones share, the storages among it; its tensors' places; whether these are aligned."""
    found = _DESCRIBED.get(weight)
    if found is None:
        parts = [getattr(weight, name) for name in TENSORS]
        there = [part for part in parts if part is not None]
        shapes = tuple([(part.dtype, part.shape, part.stride()) for part in there])
        storages = frozenset([part.untyped_storage().data_ptr() for part in there])
        places = [0 if part is None else part.storage_offset() for part in parts]
        aligned = all(part.data_ptr() % ALIGNMENT == 0 for part in there)
        kind = weight.in_features, weight.group_size, weight.scheme, weight.device, shapes, storages
        if len(_KINDS) >= MOST_KNOWN:
            _KINDS.clear()
        found = _DESCRIBED[weight] = _KINDS.setdefault(kind, kind), places, aligned
    return found


def experts_of(weights: Sequence[Int4Weight]) -> Experts | None:
    """The experts that one launch takes; None where it cannot, see ``Experts``."""
    try:
        return Experts(weights)
    except ValueError:
        return None


def lora_arguments(names: str, low: Tensor | None, high: Tensor | None) -> dict[str, Any]:
    """The arguments of LoRA's operands: the low side ``[S, R]``, and the high one ``[experts, ..., ...]``."""
    rank = 0 if low is None else low.shape[1]
    strides = (0, 0, 0) if high is None else high.stride()
    return {
        f"{names[0]}_ptr": low,
        f"{names[1]}_ptr": high,
        "R": rank,
        f"{names[0]}_strides": (0, 0) if low is None else low.stride(),
        f"{names[1]}_strides": strides[1:],
        f"stride_{names[1]}e": strides[0],
        "HAS_LORA": low is not None,
        "BLOCK_R": power_of_two_at_least(rank, most=32),
    }
