"""Problems of every kernel as data: ``Case`` says all about one launch, ``Operands`` draws its random operands."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.configs import MOST_MEMBERS, Problem, TileConfig
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import Scheme
from mebp_triton.kernels.reference import Activation, NormStyle

CaseKernel = Literal[
    "matmul",
    "matmul_dx",
    "embedding",
    "decode",
    "softmax_tile",
    "split_sums",
    "rms_norm",
    "rope",
    "gated_activation",
    "lora_gradients",
    "expert_matmul",
    "expert_matmul_dx",
]
CASE_KERNELS: tuple[CaseKernel, ...] = get_args(CaseKernel)
# What a kernel computes in several ways, the first one by default.
STYLES: dict[str, tuple[str, ...]] = {
    "rms_norm": get_args(NormStyle),
    "rope": ("forward", "inverse"),
    "gated_activation": get_args(Activation),
}
Layout = Literal["contiguous", "padded", "offset", "transposed", "expanded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One problem and how it is launched.

    Attributes:
        kernel: a kernel, or "decode" for the embedding's kernel on all rows (a panel). "rms_norm" and
            "gated_activation" are launched forward and backward.
        config: tile sizes, of products and "embedding"; the default if None. The others have no choice.
        m: tokens, or rows; of "expert_matmul" and "expert_matmul_dx", the out-features of each expert. Of no use to
            "decode" and "split_sums".
        sizes: out-features of each member of a group; of "embedding" and "decode", the table's rows; of
            "softmax_tile", the columns of one tile after the other; of "split_sums", the elements of each output; of
            "rope", the heads of q and of k; of "gated_activation", the columns; over experts, the tokens of each.
        k: in-features; of "rms_norm", the columns; of "rope", those of a head.
        scheme, group_size, scale_dtype, bits: the weights'. A scale_dtype of int8 is for scales of two levels.
        dtype: the activations', the result's, or the logits'.
        rank: LoRA's rank; 0 for none. Of "rope", the columns that are rotated; 0 for all.
        bias: whether ``matmul`` adds a bias; whether the logits of "softmax_tile" come with slopes; whether the angles
            of "rope" are float32; whether "lora_gradients" gives results of ``dtype`` and not of float32.
        split: parts of "split_sums", sequences of "rope". Products have theirs in ``config``.
        layout: how activations lie in memory: in one piece; as rows of a wider matrix, which are aligned ("padded") or
            not ("offset"); as columns; or as one row for all tokens. Weights are rows of a larger one where
            activations are "padded" or "offset".
        seed: the random numbers'.
        style: one of ``STYLES``, of a kernel that has some.

    Raises:
        ValueError: the kernel, the layout or the style is unknown, or the configuration does not suit the problem.
    """

    kernel: CaseKernel
    config: TileConfig | None = None
    m: int = 17
    sizes: tuple[int, ...] = (70,)
    k: int = 200
    scheme: Scheme = "symmetric"
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.float16
    rank: int = 0
    bias: bool = False
    split: int = 1
    layout: Layout = "contiguous"
    bits: int = 4
    seed: int = 0
    style: str = ""

    def __post_init__(self) -> None:
        if self.kernel not in CASE_KERNELS:
            raise ValueError(f"kernel must be one of {CASE_KERNELS}, got {self.kernel!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")
        styles = STYLES.get(self.kernel, ("",))
        if self.style not in ("", *styles):
            raise ValueError(f"style of {self.kernel} must be one of {styles}, got {self.style!r}")
        object.__setattr__(self, "style", self.style or styles[0])
        if self.kernel in ("matmul", "matmul_dx"):
            if not 1 <= len(self.sizes) <= MOST_MEMBERS:
                raise ValueError(f"a launch takes 1 to {MOST_MEMBERS} weights, got {len(self.sizes)}")
            if self.config is not None and not self.config.suits(self.problem):
                raise ValueError(f"config must suit the problem, got {self.config} for {self.problem}")

    @property
    def problem(self) -> Problem:
        """The problem that a configuration of a product is chosen for."""
        assert self.kernel in ("matmul", "matmul_dx", "embedding")
        n = sum(self.sizes)
        return Problem(self.kernel, self.m, n, self.k, self.scheme, self.group_size, self.dtype, self.bits)

    def __str__(self) -> str:
        """All that differs from the defaults' kind, in one line."""
        parts = [self.kernel, SHORT[self.dtype], f"M{self.m}", "N" + "+".join(map(str, self.sizes)), f"K{self.k}"]
        parts += [self.scheme, f"G{self.group_size}"] + (["8bit"] if self.bits == 8 else [])
        parts += [f"r{self.rank}"] if self.rank else []
        parts += ["bias"] if self.bias else []
        parts += [f"split{self.split}"] if self.split > 1 else []
        parts += {torch.float32: ["scales32"], torch.int8: ["two-level"]}.get(self.scale_dtype, [])
        parts += [self.style] if self.style else []
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"[{tile_name(self.config)}]"] if self.config is not None else []
        return " ".join(parts)


def tile_case(
    kernel: Literal["matmul", "matmul_dx"], config: TileConfig, aligned: bool, members: int = 1, **fields: Any
) -> Case:
    """A small product that uses all of a configuration.

    It has two tiles each way, and more steps than the pipeline has stages, in each part of a split reduction but the
    last ones, which may have fewer or none. Where the configuration's scaled sums do not suit the weight's kind, scales
    multiply weights.

    Args:
        kernel, config: what is launched.
        aligned: whether 16 divides all sizes and there are whole steps, as in a model's layers; or it divides none.
        members: weights of the launch.
        fields: further attributes of the case.
    """
    steps = config.num_stages + 2 if config.split == 1 else config.num_stages * config.split + 1
    more = 16 if aligned else 5
    if kernel == "matmul":
        sizes = (config.block_n + more, 3 * more, more)[:members]
        k = config.block_k * steps - (0 if aligned else 24)
    else:
        # The reduction runs over the members, one after the other.
        first = config.block_n * (steps - members + 1) - (0 if aligned else 11)
        sizes = (first, more, config.block_n - (0 if aligned else 3))[:members]
        k = config.block_k + (48 if aligned else 40)
    case = Case(kernel, None, config.block_m + more, sizes, k, **fields)
    return replace(case, config=config if config.suits(case.problem) else replace(config, scale_sums=False))


class Operands:
    """Draws the random operands of a case, on the CPU, so that they are the same on every device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers that lie in one piece."""
        cpu = torch.device("cpu")
        drawn = normal(*shape, dtype=dtype or self.case.dtype, device=cpu, generator=self.generator)
        return drawn.to(self.device)

    def activations(self, rows: int, columns: int) -> Tensor:
        """Normal numbers ``[rows, columns]`` that lie as the case says."""
        layout = self.case.layout
        if layout == "expanded":
            return self.numbers(1, columns).expand(rows, columns)
        return laid_out(self.numbers(rows, columns), layout)

    def weight(self, rows: int) -> Int4Weight:
        """A weight of so many rows. What lies behind its last column decodes to NaN, or with two levels to anything."""
        case = self.case
        before = {"padded": 16, "offset": 7}.get(case.layout, 0)
        weight = random_weight(
            rows + 2 * before,
            case.k,
            torch.device("cpu"),
            case.scheme,
            case.group_size,
            case.scale_dtype,
            self.generator,
            case.bits,
        )
        unread = -(-case.k // case.group_size)
        for tensor in (weight.scales, weight.minimum):
            if tensor is not None and tensor.is_floating_point():
                tensor[unread:] = math.nan
        return weight.to(self.device).rows(before, before + rows)


def tile_name(config: TileConfig) -> str:
    """A configuration in one line."""
    text = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    text += f" split{config.split}" if config.split > 1 else ""
    return text + ("" if config.weight_left else " right") + (" sums" if config.scale_sums else "")


def laid_out(values: Tensor, layout: Layout) -> Tensor:
    """The same matrix, lying in memory as ``Case.layout`` says, among NaN."""
    rows, columns = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout not in ("padded", "offset"):
        return values
    above, left = (1, 16) if layout == "padded" else (2, 3)
    wide = torch.full((rows + above, columns + 16 + left), math.nan, dtype=values.dtype, device=values.device)
    inner = wide[above:, left : left + columns]
    return inner.copy_(values)
