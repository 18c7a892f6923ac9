"""Launches a case, whatever executes it, and judges the result by the one rule of correctness.

    with Emulator(87):
        verdict = check(Case("matmul_dx", m=33, sizes=(70, 34), scheme="affine", rank=8))

Products are held against float64 on the decoded codes; what decodes, or adds in a fixed order, must agree to the bit.
Memory that a launch allocates starts as NaN, as do the gaps between the rows of views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mebp_triton.kernels import reference
from mebp_triton.kernels.accuracy import judge, sequential_product
from mebp_triton.kernels.embedding import decode_rows_triton, int4_embedding_triton
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.matmul import int4_matmul_group_triton
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_group_triton
from mebp_triton.kernels.running_softmax import RunningSoftmax
from mebp_triton.kernels.softmax_tile import update_softmax
from mebp_triton.kernels.split import parts_of, sum_parts

from .cases import Case, Operands, laid_out
from .expert_cases import EXPERT_OPERATIONS, LORA_SIZE
from .measure import poisoned
from .small_operations import OPERATIONS

ALL_OPERATIONS = OPERATIONS | EXPERT_OPERATIONS
# Different results whose error must be small beside their own size. A few sums may all happen to cancel.
FEWEST = 64
# Float32 exponentials are approximated on a GPU.
EXPONENTIAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right.

    Attributes:
        ok: whether it is.
        share: the largest error as a part of what is allowed; 0 where bits agree, infinite where they do not.
        reason: what is wrong; None if nothing is.
    """

    ok: bool
    share: float
    reason: str | None = None


class Prepared(Protocol):
    """A case with its operands and its right result, which can be launched again and again."""

    def launch(self) -> list[Tensor]:
        """Launches the kernel. All that it allocates starts as NaN."""
        ...

    def judge(self, found: list[Tensor]) -> Verdict:
        """Judges what ``launch`` returned."""
        ...


def check(case: Case, device: torch.device | str = "cpu") -> Verdict:
    """Makes a case's operands, launches it once, and judges the result."""
    prepared = prepare(case, device)
    return prepared.judge(prepared.launch())


def prepare(case: Case, device: torch.device | str = "cpu") -> Prepared:
    """Makes a case's operands, the same ones for the same case, and its right result."""
    kinds: dict[str, type[Prepared]] = {"softmax_tile": _SoftmaxTiles, "split_sums": _SplitSums}
    kinds |= dict.fromkeys(ALL_OPERATIONS, _Operation)
    kinds |= {"embedding": _Rows, "decode": _Rows, "matmul": _Forward, "matmul_dx": _Backward}
    return kinds[case.kernel](case, Operands(case, torch.device(device)))  # type: ignore[call-arg]


def _bits(found: list[Tensor], wanted: list[Tensor]) -> Verdict:
    """Compares results to the bit; NaN equals NaN."""
    for index, (one, right) in enumerate(zip(found, wanted, strict=True)):
        if one.dtype != right.dtype or one.shape != right.shape:
            return Verdict(
                False,
                math.inf,
                f"result {index} is {tuple(one.shape)} {one.dtype}, wanted {tuple(right.shape)} {right.dtype}",
            )
        different = (one != right) & ~(one.isnan() & right.isnan())
        if bool(different.any()):
            return Verdict(False, math.inf, f"{int(different.sum())} of {one.numel()} elements differ")
    return Verdict(True, 0.0)


class _Product:
    """The parts that both products share: weights, and the judgement on ``left @ right``.

    Results of 16 bits are held against a product that is rounded once, and results of float32 against a product whose
    terms are added one after another: a kernel does the same.
    """

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case = case
        self.weights = [operands.weight(size) for size in case.sizes]
        self.same: list[Tensor] = []
        self.truth: list[Tensor] = []

    def expect(self, left: list[Tensor], right: list[Tensor], weights: list[Int4Weight], bias: Tensor | None) -> None:
        """Adds an expected result: ``left`` side by side times ``right`` and the decoded ``weights`` below each other.

        Args:
            left: the activations, and LoRA's low side if there is one.
            right: LoRA's high side ``[R, columns]``, if there is one.
            weights: turned by ``matmul``.
        """
        dtype, turned = self.case.dtype, self.case.kernel == "matmul"
        for exact, results in ((False, self.same), (True, self.truth)):
            decoded = [reference.decode(weight, torch.float64 if exact else dtype) for weight in weights]
            matrices = [matrix.t() if turned else matrix for matrix in decoded] + right
            a, b = torch.cat(left, 1), torch.cat([matrix.to(decoded[0].dtype) for matrix in matrices])
            if exact:
                found = a.double() @ b
            else:
                found = sequential_product(a, b) if dtype == torch.float32 else a.float() @ b.float()
            if bias is not None:
                found = found + bias.to(found.dtype)
            results.append(found if exact else found.to(dtype))

    def judge(self, found: list[Tensor]) -> Verdict:
        """Judges all members together: in few numbers torch's own error may be as good as none."""
        for one, same in zip(found, self.same, strict=True):
            if one.shape != same.shape:
                return Verdict(False, math.inf, f"a result is {tuple(one.shape)}, wanted {tuple(same.shape)}")
        whole, same, truth = (torch.cat(parts, 1) for parts in (found, self.same, self.truth))
        different = truth.shape[1] * (1 if self.case.layout == "expanded" else truth.shape[0])
        verdict = judge(whole, same, truth, product=different >= FEWEST)
        share = verdict.get("share")
        return Verdict(verdict["ok"], math.inf if share is None else share, verdict.get("reason"))


class _Forward(_Product):
    def __init__(self, case: Case, operands: Operands) -> None:
        super().__init__(case, operands)
        rank, total, size = case.rank, sum(case.sizes), LORA_SIZE * math.sqrt(case.k / max(1, case.rank))
        self.x = operands.activations(case.m, case.k)
        self.bias = operands.numbers(total) if case.bias else None
        self.t = operands.activations(case.m, rank * len(case.sizes)) if rank else None
        self.b = laid_out(operands.numbers(total, rank) * size, case.layout) if rank else None
        first = 0
        for index, (weight, n) in enumerate(zip(self.weights, case.sizes, strict=True)):
            rows = slice(first, first + n)
            left, right = [self.x], []
            if self.t is not None and self.b is not None:
                left.append(self.t[:, index * rank : (index + 1) * rank])
                right.append(self.b[rows].t())
            self.expect(left, right, [weight], None if self.bias is None else self.bias[rows])
            first += n

    def launch(self) -> list[Tensor]:
        with poisoned():
            return int4_matmul_group_triton(self.x, self.weights, self.bias, self.t, self.b, self.case.config)


class _Backward(_Product):
    def __init__(self, case: Case, operands: Operands) -> None:
        super().__init__(case, operands)
        ranks, size = case.rank * len(case.sizes), LORA_SIZE * math.sqrt(sum(case.sizes) / max(1, case.rank))
        self.dys = [operands.activations(case.m, n) for n in case.sizes]
        self.g = operands.activations(case.m, ranks) if ranks else None
        self.a = laid_out(operands.numbers(ranks, case.k) * size, case.layout) if ranks else None
        low, high = ([] if term is None else [term] for term in (self.g, self.a))
        self.expect([*self.dys, *low], high, self.weights, None)

    def launch(self) -> list[Tensor]:
        with poisoned():
            return [int4_matmul_dx_group_triton(self.dys, self.weights, self.g, self.a, self.case.config)]


class _Rows:
    """Decoded rows: by id, among which there are ids out of range; or all of them."""

    def __init__(self, case: Case, operands: Operands) -> None:
        (rows,) = case.sizes
        self.case, self.weight = case, operands.weight(rows)
        self.wanted = reference.decode(self.weight, case.dtype)
        if case.kernel == "embedding":
            ids = torch.randint(-1, rows + 1, (2 * case.m,), generator=operands.generator).to(operands.device)
            # The first ones out of range, on both sides.
            ids[:4:2] = torch.tensor([rows, -1])[: case.m]
            self.ids = ids[::2].contiguous() if case.layout == "contiguous" else ids[::2]
            valid = (self.ids >= 0) & (self.ids < rows)
            self.wanted = torch.where(valid[:, None], self.wanted[self.ids.clamp(0, rows - 1)], math.nan)

    def launch(self) -> list[Tensor]:
        with poisoned():
            if self.case.kernel == "embedding":
                return [int4_embedding_triton(self.ids, self.weight, self.case.dtype, self.case.config)]
            return [decode_rows_triton(self.weight, laid_out(torch.full_like(self.wanted, math.nan), self.case.layout))]

    def judge(self, found: list[Tensor]) -> Verdict:
        return _bits(found, [self.wanted])


class _SoftmaxTiles:
    """A chain of tiles of logits, and the state of the softmax after them."""

    STATE = ("maximum", "total", "at_target", "target_slope", "argmax")

    def __init__(self, case: Case, operands: Operands) -> None:
        total = sum(case.sizes)
        self.case = case
        self.targets = torch.randint(0, total, (case.m,), generator=operands.generator).to(operands.device)
        # A target just behind the first tile, in the row behind which there is nothing.
        self.targets[-1] = case.sizes[0] % total
        self.logits = [operands.activations(case.m, size) * 8 for size in case.sizes]
        for z in self.logits:
            # Where the largest one stands at several places, the first one counts.
            z[: len(z) // 2, ::2] = z[: len(z) // 2].amax(1, keepdim=True)
        self.slopes = [
            operands.numbers(case.m, size, dtype=torch.float32) if case.bias else None for size in case.sizes
        ]
        self.same, self.truth = self._by_torch(torch.float32), self._by_torch(torch.float64)

    def _by_torch(self, wide: torch.dtype) -> list[Tensor]:
        softmax, start, results = RunningSoftmax(self.targets, wide, 1.0), 0, []
        for z, slope in zip(self.logits, self.slopes, strict=True):
            results += softmax.update(z.to(wide, copy=True), None if slope is None else slope.to(wide), start)
            start += z.shape[1]
        return results + [getattr(softmax, name) for name in self.STATE]

    def launch(self) -> list[Tensor]:
        softmax, start, results = RunningSoftmax(self.targets, torch.float32, 1.0), 0, []
        with poisoned():
            for z, slope in zip(self.logits, self.slopes, strict=True):
                # A copy, because the kernel writes the probabilities in place of the logits.
                tile = laid_out(z.contiguous(), "padded") if self.case.layout != "contiguous" else z.clone()
                results += update_softmax(softmax, tile, slope, start)
                start += z.shape[1]
        return results + [getattr(softmax, name) for name in self.STATE]

    def judge(self, found: list[Tensor]) -> Verdict:
        worst = 0.0
        for one, same, truth in zip(found, self.same, self.truth, strict=True):
            if one.dtype in (torch.float16, torch.bfloat16):
                verdict = judge(one, same.to(one.dtype), truth)
                ok, share, reason = verdict["ok"], verdict.get("share"), verdict.get("reason")
            else:
                error, allowed = (one.double() - truth).abs(), EXPONENTIAL_TOLERANCE * (truth.double().abs() + 0.1)
                share = float((error / allowed).nan_to_num(nan=math.inf).max())
                ok, reason = share <= 1, f"{share:.3g} times the allowed error"
            if not ok:
                return Verdict(False, math.inf if share is None else share, reason)
            worst = max(worst, share)
        return Verdict(True, worst)


class _SplitSums:
    """Partial results of several outputs, added in order."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case, self.outs = case, [torch.empty(n, dtype=case.dtype, device=operands.device) for n in case.sizes]
        total = sum(case.sizes)
        self.numbers = operands.numbers(case.split, total, dtype=torch.float32) * 1000
        sums = torch.zeros(total, device=operands.device)
        for part in self.numbers:
            sums += part
        self.wanted = list(sums.to(case.dtype).split(case.sizes))

    def launch(self) -> list[Tensor]:
        outs = [torch.full_like(out, math.nan) for out in self.outs]
        parts = parts_of(outs, self.case.split)
        # The first output's first part is the start of the whole buffer.
        parts[0].copy_(self.numbers.flatten())
        sum_parts(parts, outs, self.case.split)
        return outs

    def judge(self, found: list[Tensor]) -> Verdict:
        return _bits(found, self.wanted)


class _Operation:
    """Results of kernels over experts, and without int4 weights, against torch in the same dtype and in float64."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self.operation = ALL_OPERATIONS[case.kernel](case, operands)
        self.same, self.truth = (self.operation.by_torch(dtype) for dtype in (case.dtype, torch.float64))
        # A sum of equal terms takes up the same rounding again and again, in a kernel and in torch.
        self.product = self.operation.product and case.layout != "expanded"

    def launch(self) -> list[Tensor]:
        with poisoned():
            return self.operation.launch()

    def judge(self, found: list[Tensor]) -> Verdict:
        worst = 0.0
        for one, same, truth in zip(found, self.same, self.truth, strict=True):
            verdict = judge(one, same, truth, product=self.product and truth.numel() >= FEWEST)
            share = verdict.get("share")
            if not verdict["ok"]:
                return Verdict(False, math.inf if share is None else share, verdict["reason"])
            worst = max(worst, verdict["share"])
        return Verdict(True, worst)
