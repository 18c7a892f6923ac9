"""Rounding that makes up for its own errors: GPTQ (arXiv 2210.17323).

What a layer gives for inputs ``X`` ``[T, K]`` changes by ``X dWᵀ`` when its weight does. The squared norm of that is
``tr(dW H dWᵀ)`` with ``H = XᵀX``. Columns are rounded from left to right, and each time the columns on the right are
moved to where they undo most of the error. The scales of a group are fitted when its turn comes, to the columns as they
are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import SUPER_GROUP, Int4Weight
from .names import Form
from .scales import Scales, fit_scales

# Columns that an error is handed on to at once. All others take the errors of so many columns together.
STRETCH = 32
# What is added to the diagonal of H: a part of itself, and a part of its mean.
OWN_DAMPING, MEAN_DAMPING = 0.5, 0.01


def compensation(products: Tensor, damping: float = OWN_DAMPING, least: float = MEAN_DAMPING) -> Tensor:
    """Makes the factor by which columns make up for each other, from the sum of ``x xᵀ`` over inputs ``x`` ``[K]``.

    Args:
        products: ``[K, K]`` float32, of any scale. Twice its memory is taken on top, the factor included.
        damping: what is added to the diagonal, as a part of each entry. It keeps columns from following what is chance
            in the text that the inputs come from.
        least: likewise, as a part of the diagonal's mean. It keeps columns that are hardly ever used where they are.

    Returns:
        ``[K, K]`` float32, upper triangular, and the same for products of another scale. Where rounding adds ``e`` to
        column ``k``, the columns on its right get ``-e * factor[k, k + 1:] / factor[k, k]``.

    Raises:
        ValueError: the products are not finite.
    """
    if not products.isfinite().all():
        raise ValueError("the layer's inputs on the calibration text are not finite")
    # Cholesky's factor is a lower triangle, so H is turned around: with R an upper one, H = R Rᵀ. The factor in GPTQ is
    # the U of H⁻¹ = UᵀU, which is the inverse of R. H is divided by its mean diagonal first: in float32 a sum of
    # large numbers overflows.
    mean = float(products.diagonal().mean(dtype=torch.float64))
    turned = products.flip(0, 1).div_(max(mean, torch.finfo(torch.float32).tiny))
    turned.diagonal().mul_(1 + damping).add_(least)
    turned = torch.linalg.cholesky(turned)
    root = turned.flip(0, 1)
    del turned
    # Solved in place for Uᵀ, whose columns are the rows of U, so that nothing is copied.
    factor = torch.eye(len(root))
    torch.linalg.solve_triangular(root.mT, factor.mT, upper=False, left=False, out=factor.mT)
    return factor


def compensated_rows(
    rows: Tensor,
    form: Form,
    scale_search: bool,
    scale_dtype: torch.dtype,
    importance: Tensor | None,
    factor: Tensor,
) -> tuple[Int4Weight, Tensor]:
    """Quantizes ``rows`` ``[N, K]``, float32; see ``quantize_matrix`` for the arguments.

    Scales are fitted for one group at a time, or for 256 columns where they have two levels.

    Returns:
        The weight, and what it decodes to, float32.
    """
    left = rows.t().contiguous()  # a column's weights lie together; it becomes what the weight decodes to
    columns, span = len(left), SUPER_GROUP if scale_dtype == torch.int8 else form.group_size
    codes = torch.empty(left.shape, dtype=torch.uint8)
    parts: list[Scales] = []
    for start in range(0, columns, STRETCH):
        stop = min(start + STRETCH, columns)
        errors = torch.empty(stop - start, left.shape[1])
        for column in range(start, stop):
            if column % span == 0:
                these = slice(column, column + span)
                values = left[these].t().contiguous()
                weights = None if importance is None else importance[these]
                parts.append(fit_scales(values, form, scale_dtype, weights, scale_search))
                levels = parts[-1].levels()
            if column % form.group_size == 0:
                group = levels.group(column % span // form.group_size)
            code, decoded = (part.squeeze(1) for part in group.round(left[column].unsqueeze(1)))
            error = torch.sub(left[column], decoded, out=errors[column - start]).div_(factor[column, column])
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            codes[column], left[column] = code, decoded
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return Scales.joined(parts).weight(codes.t().contiguous()), left.t()
