"""Why some errors in compiled kernels cannot be noticed: what they change makes no difference, or too little of one.

An entry holds for errors whose description (``compiled_mutants.described``) matches all of its patterns.
"""

from __future__ import annotations

import re
from typing import Any

LOWER_BITS = (
    "It concerns the lower bits of a scale alone: less than half a rounding of the weight, which a product may be off. "
    "Rows that must agree to the bit show it."
)
ZEROS_OF_X = "The columns from K on meet zeros in x, whose loads have the same mask."
LOAD = r"= tl\.load\(|return tl\.load\("
WAIT = r"one group less|wait removed|group not ended"
SECOND = r"acc = tl\.dot\(w_high|acc_high = tl\.dot\("

EXPLANATIONS: tuple[tuple[dict[str, str], str], ...] = (
    # Barriers and fences.
    ({"kind": "barrier removed", "before": r"cp\.async\.wait_group", "next": r"ld\.shared", "code": LOAD},
     "A thread reads, of the packed tile, only what it has copied itself. All else is read behind the next barrier."),
    ({"kind": "barrier removed", "kernel": "lora_gradients", "before": r"cp\.async\.wait_group", "next": r"st\.shared"},
     "What is written next was last read before the barrier at the end of the step before, and nothing is read before "
     "the barrier behind it."),
    ({"kind": "barrier removed", "before": r"wgmma\.wait_group", "next": r"wgmma\.mma"},
     "Products only read shared memory, and what they read is next written behind other barriers."),
    ({"kind": "barrier removed", "before": r"wgmma\.wait_group", "next": r"cp\.async\.c[ag]"},
     "The copy goes to the part of the ring that the step before has read, with a barrier since; or it is the thread's "
     "own part of the packed tile."),
    ({"kind": "barrier removed", "source": r"standard\.py.* < softmax_tile\.py", "next": r"st\.shared"},
     "What is written next was last read before the barrier between the two halves of the other reduction."),
    ({"kind": "proxy fence removed", "code": SECOND},
     "Nothing was written to shared memory since the fence before the product with the low columns."),
    ({"kind": "register fence removed", "code": SECOND},
     "Both operands are in shared memory, and the sums were set before the fence of the product with the low columns."),
    ({"kind": "register fence removed", "code": r"tl\.dot\((b\.to|g, a)"},
     "Both operands are in shared memory, and only products have set the sums."),
    ({"kind": WAIT, "instruction": r"wgmma", "kernel": r"matmul [bf]"},
     "Products that add to the same sums are in order, and another wait comes before the sums are read and before what "
     "the products read is written."),
    ({"kind": WAIT, "instruction": r"wgmma", "code": r"acc_(low|high) = tl\.dot"},
     "The sums of the low columns are not read before the wait behind the product of the high ones."),
    # Masks.
    ({"kind": "guard dropped", "code": r"(cos|sin)_low = tl\.load"},
     "Angles of the second half, which lie behind those of the first, for columns that are not stored."),
    ({"kind": "half of a mask dropped", "kernel": "lora_gradients", "code": r"= tl\.load\(", "kept": r"mask_m = "},
     "Columns behind the last one, of rows that are there: they are multiplied and not stored."),
    ({"kind": "mask dropped", "kernel": "lora_gradients", "mask": "mask_m = ", "whole": "True"},
     "Sizes are multiples of 16 in this kernel, and the first 16 tokens of a step are all there."),
    ({"kind": "half of a mask dropped", "kernel": "lora_gradients", "code": r"^for m0 in range"},
     "A step behind the last one, which the pipeline loads in vain. The mask of rows is false there as well."),
    ({"kind": "bound one too far", "code": r"// 32 \* 64 < K|\(offs_c < K\)"},
     "It compares with K where chunks of 64 columns begin. None begins at K: K is no multiple of 64, or a tile is one "
     "chunk, and there are only tiles that begin before K."),
    ({"kind": "bound one too far", "instruction": r"setp\.lt\.[su]64", "code": r"step < ends"},
     "It compares steps, of which the pipeline then loads one in vain."),
    ({"kind": "bound one too far", "lines": "^1$", "code": r"offs_n < ", "whole": "False"},
     "It compares rows at multiples of 16 with N, which is none in this kernel; or steps, of which the pipeline then "
     "loads one in vain."),
    ({"kind": r"mask dropped|bound one too far", "kernel": "expert_", "source": r"weight_tiles\.py", "mask": "mask_n"},
     "Rows behind the last one, which are computed and not stored. In one storage with others, a weight has bytes of "
     "another behind it."),
    ({"kind": r"mask dropped|bound one too far", "kernel": "expert_matmul_dx", "code": r"return member, offs_n"},
     "Rows behind the last one, whose gradients are zeros, and whose scales or codes are still masked. In one storage "
     "with others, a weight has bytes of another behind it."),
    ({"kind": "bound one too far", "kernel": "expert_.*16x", "code": r"rows_m < tl\.load", "whole": "True"},
     "Experts end at multiples of 16 rows in this kernel, where their last tile ends."),
    ({"kind": "bit of an index lost", "code": r"^$", "kernel": "expert_matmul .*affine", "instruction": ", 320$"},
     "It chooses among copies of one scale."),
    ({"kind": "half of a mask dropped", "code": r"\(offs_c < K\)", "kernel": "matmul_dx"},
     "The scales of columns from K on, which are computed but not stored. There is memory for whole chunks of them."),
    ({"kind": "^mask dropped", "mask": r"// 32 \* 64 < K", "kernel": r"x64 w"},
     "A tile of 64 columns is one chunk, and there are only steps that begin before K."),
    ({"kind": "^mask dropped", "mask": r"step < ends"},
     "The rows of a step that another part takes, or nobody, which the pipeline loads in vain."),
    ({"kind": "^mask dropped", "code": r"(low|high) = tl\.where\(\(columns"}, ZEROS_OF_X),
    ({"kind": "bit of an index lost", "code": r"^$", "kernel": "matmul fp16 .*codebook", "instruction": ", 16$"},
     "It moves the columns at which weights are masked. " + ZEROS_OF_X),
    ({"kind": "half of a mask dropped", "code": r"tl\.store\(|mask_m\[None, :\] & mask_n", "whole": "True"},
     "Sizes are multiples of 16 in this kernel, and the first 16 rows of a tile are all there."),
    ({"kind": "guard dropped", "code": r"tl\.store\(\w+_ptr \+ row"},
     "All threads have the same value, and put it into the same place."),
    ({"kind": "bit of an index lost", "code": "offs_v = tl.arange"},
     "Two threads of a warp put the same value into the same place, where one would do."),
    ({"kind": "bit of an index lost", "code": r"tl\.dot", "instruction": "32767"},
     "The bit of an address from which shared memory's tiles never begin."),
    # Values.
    ({"kind": "other bits of a code", "becomes": "c, 0x1f;"},
     "The code is in the highest bits of its register: above it there is nothing to be cut off."),
    ({"kind": "number off", "instruction": r"0f00000000"},
     "These are the sums of a reduction without steps; where there are steps, they are set again. Only a part of a "
     "split reduction may have none."),
    ({"kind": "operands exchanged", "instruction": r"fma\.rn\.bf16x2 p, \S+, \S+, none"}, LOWER_BITS),
    ({"kind": "halves exchanged", "code": r"return upper, \(rest"}, LOWER_BITS),
    ({"kind": "term left out", "code": r"// (BLOCK|SPLIT)"},
     "The term that rounds negative numbers towards zero; sizes are positive."),
    ({"kind": "sides exchanged", "mask": r"begin == 0", "kernel": "split2"},
     "With two parts of the reduction, either way one of them adds it."),
    ({"kind": "wrong selector", "code": r"tl\.store\(", "instruction": r"0x7701"},
     "The byte is shifted out of the register."),
)  # fmt: skip


def explanation(error: dict[str, Any]) -> str | None:
    """The reason why an error could not be noticed; None if there is no entry for it."""
    for patterns, reason in EXPLANATIONS:
        if all(re.search(pattern, str(error[name])) for name, pattern in patterns.items()):
            return reason
    return None
