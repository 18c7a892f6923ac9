"""The kernel of LoRA's gradients in Triton's interpreter, against float64; ``test_compiled`` executes it compiled."""

from __future__ import annotations

import pytest
import torch
from token_gradients import SIZES, verdicts

from mebp_triton.kernels.lora_gradients import lora_gradients_triton

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted(sizes, dtype, device):
    for out_dtype, transposed in ((torch.float32, False), (dtype, True)):
        found = list(verdicts(sizes, dtype, out_dtype, transposed, device))
        assert all(verdict["ok"] for verdict in found), found


def test_what_it_refuses(normal):
    left, right, out = normal(5, 7), normal(5, 2), normal(7, 2)
    for members, reason in (
        (([], [], []), "1 to 3 members"),
        (([left] * 4, [right] * 4, [out] * 4), "1 to 3 members"),
        (([left], [right[:4]], [out]), "left must have shape"),
        (([left], [right], [normal(7, 3)]), "out must have shape"),
        (([left], [right.double()], [out]), "right must be one of"),
        (([left], [right.half()], [out]), "differ in a dtype"),
        (([left, left], [right, right], [out, out.half()]), "differ in a dtype"),
        (([left, left], [right, normal(5, 4)[:, :2]], [out, out]), "differ in a dtype or stride"),
    ):
        with pytest.raises(ValueError, match=reason):
            lora_gradients_triton(*members)
