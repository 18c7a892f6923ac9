"""Spends a budget of bits: which linear layers of a model get codes of 8 bits where the others have 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mebp_triton.convert.calibration.calibration import Calibration
from mebp_triton.convert.readers.source import Source
from mebp_triton.convert.recipe import Recipe, quantize_as, scale_dtype_of
from mebp_triton.kernels.layout import Int4Weight, tensor_shapes
from mebp_triton.kernels.names import Form, fill_form
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import Int4Site

# How much an error does in a kind of layer, beside the same relative error in another kind. They are means over two
# models of the divergence that rounding one kind causes; docs/decisions.md has the figures. Other kinds count 1.
HARM = {"v_proj": 1.5, "gate_proj": 0.4, "o_proj": 0.25, "q_proj": 0.2, "k_proj": 0.2}


class LayerCost(NamedTuple):
    """The bytes of a linear layer, and what rounding loses.

    Attributes:
        weights: how many it has.
        narrow, wide: its bytes with codes of 4 and of 8 bits, scales counted.
        error: the squared relative error with 4 bits: of what it gives on a calibration's text, or of its weights.
    """

    weights: int
    narrow: int
    wide: int
    error: float


def forms_within(
    source: Source,
    sites: Sequence[Int4Site],
    prefixes: Sequence[str],
    recipe: Recipe,
    bits_per_weight: float,
    calibration: Calibration | None,
    progress: Callable[[], None],
) -> dict[str, Form]:
    """The forms of the linear layers whose mean is at most ``bits_per_weight``; see ``quantize``.

    Args:
        source: is bound to the model. Its linear layers are read once here, one at a time.
        sites: the matrices of the model.
        prefixes: how the names of each block's modules begin, in the order of the blocks.
        recipe: what is asked for of the linear layers; no width.
        bits_per_weight: of the linear layers, scales counted.
        calibration: tells what layers do with their inputs; None where there is no text.
        progress: called after each layer.

    Raises:
        ValueError: the source has codes, or the budget is too small or too large.
    """
    narrow = fill_form(recipe.scheme, recipe.group_size, 4)
    wide = fill_form(None if recipe.scheme == "codebook" else recipe.scheme, recipe.group_size, 8)
    linear = [site for site in sites if not site.is_table]
    shapes = [(site.out_features, site.in_features) for site in linear]
    expected = [LayerCost(prod(shape), _bytes(shape, narrow), _bytes(shape, wide), 0.0) for shape in shapes]
    _check_budget(expected, bits_per_weight, narrow, wide)  # what no choice can keep is refused before a layer is read
    costs: dict[str, LayerCost] = {}

    def measure(layers: Sequence[Int4Site]) -> None:
        for site in layers:
            costs[site.name] = _cost(source, site, narrow, wide, calibration)
            progress()

    for prefix in prefixes:
        with nullcontext() if calibration is None else calibration.block():
            measure([site for site in linear if site.name.startswith(prefix)])
    measure([site for site in linear if site.name not in costs])
    chosen = choose_wide(costs, bits_per_weight, narrow, wide)
    return {site.name: wide if site.name in chosen else narrow for site in linear}


def choose_wide(costs: Mapping[str, LayerCost], bits_per_weight: float, narrow: Form, wide: Form) -> set[str]:
    """The layers that get ``wide`` codes: those where a bit more takes away the most harm, as long as the budget lasts.

    Raises:
        ValueError: the budget is below what ``narrow`` codes take, or above what ``wide`` ones do.
    """
    _check_budget(costs.values(), bits_per_weight, narrow, wide)

    def gain(name: str) -> float:
        cost = costs[name]
        return HARM.get(name.rpartition(".")[2], 1.0) * cost.error / (cost.wide - cost.narrow)

    return spend(costs, sorted(costs, key=gain, reverse=True), bits_per_weight)


def _check_budget(costs: Collection[LayerCost], bits_per_weight: float, narrow: Form, wide: Form) -> None:
    weights = sum(cost.weights for cost in costs)
    least = 8 * sum(cost.narrow for cost in costs) / weights
    most = 8 * sum(cost.wide for cost in costs) / weights
    if not least <= bits_per_weight <= most:
        raise ValueError(
            f"bits_per_weight must be {math.ceil(100 * least) / 100:g} to {math.floor(100 * most) / 100:g}, got "
            f"{bits_per_weight}: that is what the linear layers take with {narrow} and with {wide}, scales counted"
        )


def spend(costs: Mapping[str, LayerCost], order: Iterable[str], bits_per_weight: float) -> set[str]:
    """The layers that get wide codes: each in this order that what is left of the budget has room for."""
    weights = sum(cost.weights for cost in costs.values())
    left = int(bits_per_weight * weights / 8 + 1e-6) - sum(cost.narrow for cost in costs.values())
    chosen = set()
    for name in order:
        more = costs[name].wide - costs[name].narrow
        if more <= left:
            chosen.add(name)
            left -= more
    return chosen


def _cost(source: Source, site: Int4Site, narrow: Form, wide: Form, calibration: Calibration | None) -> LayerCost:
    """Rounds a layer without a search for its scales, whose error ranks layers as the one with a search does."""
    value = source.read(f"{site.name}.weight")
    if isinstance(value, Int4Weight) or f"{site.name}.weight" in source.decoded:
        raise ValueError(
            f"bits_per_weight is for models of 16 or 32 bits, and {site.name} has codes already: leave it out, and they"
            " are taken over"
        )
    matrix: Tensor = value.t().contiguous() if site.transposed else value
    try:
        weight, error = quantize_as(narrow, matrix, scale_search=False)
    except ValueError as problem:
        raise ValueError(f"{site.name}: {problem}") from None
    inputs = None if calibration is None else calibration.inputs(site.name)
    squared = error**2 if inputs is None else inputs.output_error(matrix.float(), decode(weight, torch.float32))
    dtype = torch.float32 if weight.scales.dtype == torch.float32 else None
    return LayerCost(prod(weight.shape), weight.nbytes, _bytes(weight.shape, wide, dtype), squared)


def _bytes(shape: tuple[int, int], form: Form, scale_dtype: torch.dtype | None = None) -> int:
    """The bytes of a matrix in a store; ``scale_dtype`` None for the usual one."""
    tensors = tensor_shapes(*shape, form, scale_dtype or scale_dtype_of(form))
    return sum(dtype.itemsize * prod(size) for dtype, size in tensors.values())
