"""LoRA over an int4 weight: the autograd function and the layers.

``Y = X·Wᵀ + bias + s·(X·Aᵀ)·Bᵀ``; backward, with ``g = s·dY·B``: ``dX = dY·W + g·A``, ``dA = gᵀ·X``,
``dB = s·dYᵀ·(X·Aᵀ)``. Nothing of size ``[N, K]`` is allocated; ``s·X·Aᵀ`` ``[M, R]`` is kept for the backward pass.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import regex
import torch
from torch import Tensor, nn

from .kernels.layout import Int4Weight
from .kernels.ops import (
    check_floating,
    int4_embedding,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
    int4_matmul_group,
)

if TYPE_CHECKING:
    from .siblings import Siblings


MATCH_SECONDS = 1.0  # for one path; it takes microseconds
LONGEST_EXPRESSION = 1 << 14
MOST_REPEATS = 100_000  # all fixed counts multiplied


@dataclass(frozen=True)
class LoraConfig:
    """Names and meaning as in PEFT.

    Attributes:
        r: rank, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
        lora_dropout: probability, on the input of the LoRA branch, while training.
        target_modules: "all-linear" (every linear layer but the head), a list of names (a module matches if its
            path is the name or ends with "." + name), or one regular expression that must match the whole path.
        exclude_modules: as ``target_modules``, taken out of what that selected.
        use_rslora: see ``lora_alpha``.
        rank_pattern, alpha_pattern: other values by a regular expression that must match the path, or its end after a
            dot; the first that does counts.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must map regular expressions to numbers, got {pattern!r:.100}")
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or not 1 <= rank < 1 << 31:
                raise ValueError(f"lora rank r must be a whole number of at least 1, got {rank!r:.100}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r:.100}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not _is_number(alpha) or not abs(alpha) < 1e30:
                raise ValueError(f"lora_alpha must be finite, got {alpha!r:.100}")
        if type(self.use_rslora) is not bool:
            raise ValueError(f"use_rslora must be true or false, got {self.use_rslora!r:.100}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name modules, or use 'all-linear'")
        for name in ("target_modules", "exclude_modules"):
            wanted = getattr(self, name)
            names = wanted if isinstance(wanted, list | tuple) else [wanted or ""]
            if not all(isinstance(module, str) for module in names):
                raise ValueError(f"{name} must be names, or one regular expression, got {wanted!r:.100}")

    def rank(self, path: str) -> int:
        return _pattern_value(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        alpha = _pattern_value(self.alpha_pattern, path, self.lora_alpha)
        rank = self.rank(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, path: str) -> bool:
        """Whether the linear layer at ``path`` (never the head) gets an adapter."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        return self.target_modules == "all-linear" or _matches(self.target_modules, path)


def as_lora_config(config: Any) -> LoraConfig:
    """A ``LoraConfig`` from ours or from a ``peft.LoraConfig``. ValueError for what only PEFT's layers can do."""
    if isinstance(config, LoraConfig):
        return config
    if getattr(config, "peft_type", None) is None:
        raise ValueError(f"lora must be a LoraConfig of mebp_triton or of peft, got {type(config).__name__}")
    values = {key: value for key, value in vars(config).items() if value is not None}
    taken = lora_config_from_dict(values)
    if "target_modules" not in values:
        raise ValueError("peft.LoraConfig without target_modules depends on the architecture: name the modules")
    if values.get("init_lora_weights", True) is not True:
        raise ValueError(f"init_lora_weights={values['init_lora_weights']!r} is not supported: leave it at True")
    return taken


# PEFT's settings that change what an adapter computes, and the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([], ()),
    "layer_replication": ([], ()),
    "target_parameters": ([], ()),
    "trainable_token_indices": ([], {}, ()),
    "layers_to_transform": ([], ()),
    "bias": ("none",),
    "use_bdlora": (False,),
    "alora_invocation_tokens": ([], ()),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    # Any other initialisation (PiSSA, OLoRA, CorDA, LoftQ) changes the base weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


# Those that change nothing, or nothing once an adapter is trained, whatever their value.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"}
WITHOUT_EFFECT |= {"inference_mode", "fan_in_fan_out", "layers_pattern", "megatron_config", "megatron_core"}
WITHOUT_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
WITHOUT_EFFECT |= {"runtime_config", "ensure_weight_tying"}


def lora_config_from_file(values: dict[str, Any]) -> LoraConfig:
    """``lora_config_from_dict`` of a file: ValueError also for what it lacks, and for a setting that is not known."""
    for key in ("r", "lora_alpha", "target_modules"):
        if values.get(key) is None:
            raise ValueError(f"it has no {key}")
    known = {item.name for item in fields(LoraConfig)} | UNSUPPORTED.keys() | WITHOUT_EFFECT
    for key in sorted(values.keys() - known):
        if values[key] not in (None, False, [], {}):
            raise ValueError(f"the adapter uses {key!r:.100}, which is not known here; train it without")
    return lora_config_from_dict(values)


def lora_config_from_dict(values: dict[str, Any]) -> LoraConfig:
    """From the fields of PEFT's ``adapter_config.json``."""
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"the adapter is of type {kind!r:.100}; only LORA is supported")
    for key, unused in UNSUPPORTED.items():
        value = values.get(key)
        # Of the same type, since 0 and 1 are False and True to Python.
        if value is not None and not any(type(value) is type(off) and value == off for off in unused):
            raise ValueError(f"the adapter uses {key}={value!r:.100}, which is not supported; train it without")
    known = {item.name for item in fields(LoraConfig)}
    taken = {key: value for key, value in values.items() if key in known and value is not None}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(taken.get(key), set | list | tuple):
            taken[key] = tuple(sorted(taken[key], key=str))
    return LoraConfig(**taken)


def _matches(wanted: str | tuple[str, ...] | list[str], path: str) -> bool:
    if isinstance(wanted, str):
        return _fullmatch(wanted, path)
    return any(path == name or path.endswith("." + name) for name in wanted)


def _pattern_value(pattern: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if _fullmatch(rf"(.*\.)?({key})", path)), default)


@lru_cache(maxsize=1 << 16)
def _fullmatch(expression: str, path: str) -> bool:
    """As ``re.fullmatch``, but that an expression from a file may not run on and on: ``(a+)+$`` takes 2^n steps.

    ``regex`` means the same by what ``re`` compiles, but for its fuzzy and POSIX forms, which no path needs.
    """
    try:
        # Fixed counts are unrolled when the expression is compiled: "a{1000000000}" would take all memory.
        counts = [int(count[:9]) for count in re.findall(r"\{([0-9]+)", expression)]
        long = len(expression) > LONGEST_EXPRESSION or math.prod(filter(None, counts)) > MOST_REPEATS
        if long or re.search(r"\{[^0-9,]|\[\[:", expression):
            raise re.error("too long, or of a form that is not supported")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
            return regex.fullmatch(expression, path, timeout=MATCH_SECONDS) is not None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{expression!r:.100} is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"{expression!r:.100} takes too long to match {path}: write it without nested repeats"
        ) from None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


@dataclass(frozen=True)
class LoraOperand:
    """One layer's part in a call of ``int4_lora_linears``: weight ``[N, K]``, bias ``[N]``, lora_a ``[R, K]``,
    lora_b ``[N, R]``."""

    weight: Int4Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class _Int4LoRAFunction(torch.autograd.Function):
    """Of one layer, or of several with one input. Tensors follow as bias, lora_a, lora_b of each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[Int4Weight, ...],
        scalings: tuple[float, ...],
        backend: str,
        known: tuple[Tensor, ...] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        biases: Any = tensors[0::3]
        lora_as: Any = tensors[1::3]
        lora_bs: Any = tensors[2::3]
        t = x @ _concatenated(lora_as, x.dtype).t()  # [..., sum of R]
        ts = t.split([b.shape[1] for b in lora_bs], dim=-1)
        for part, scaling in zip(ts, scalings, strict=True):
            part.mul_(scaling)
        ctx.save_for_backward(x, t, *tensors)
        ctx.weights, ctx.scalings, ctx.backend = weights, scalings, backend
        # An output that nobody used brings no gradient: it is then left out of the sums.
        ctx.set_materialize_grads(False)
        if known is not None:
            return known
        if len(weights) == 1:
            return (int4_matmul(x, weights[0], biases[0], t, lora_bs[0], backend),)
        return tuple(int4_matmul_group(x, weights, biases, ts, lora_bs, backend))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing does not hand them out again
        # Whoever calls backward under autocast would otherwise get its products rounded.
        with torch.autocast(saved[0].device.type, enabled=False):
            return _lora_gradients(ctx, saved, dys)


def _concatenated(lora_as: Sequence[Any], dtype: torch.dtype) -> Tensor:
    given = [a.to(dtype) for a in lora_as]
    return given[0] if len(given) == 1 else torch.cat(given)


def _lora_gradients(ctx: Any, saved: tuple[Tensor, ...], dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, t, *tensors = saved
    need_x, _, _, _, _, *need = ctx.needs_input_grad
    ts = t.split([a.shape[0] for a in tensors[1::3]], dim=-1)
    gradients: list[Tensor | None] = [None] * len(tensors)
    taken = [index for index, dy in enumerate(dys) if dy is not None]
    if not taken:
        return None, None, None, None, None, *gradients
    rounded: list[Tensor] = []
    gs: list[Tensor] = []
    for index in taken:
        bias, _, lora_b = tensors[3 * index : 3 * index + 3]
        need_bias, need_a, need_b = need[3 * index : 3 * index + 3]
        dy: Any = dys[index]
        dy = dy.to(x.dtype)
        rounded.append(dy)
        if need_x or need_a:
            gs.append((dy @ lora_b.to(x.dtype)).mul_(ctx.scalings[index]))  # [..., R]
        if need_bias:
            total = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=_wide(bias.dtype))
            gradients[3 * index] = total.to(bias.dtype)
        if need_a:
            gradients[3 * index + 1] = _reduce_tokens(gs[-1], x, tensors[3 * index + 1].dtype)
        if need_b:
            gradients[3 * index + 2] = _reduce_tokens(dy, ts[index], lora_b.dtype)
    dx = None
    if need_x:
        weights = [ctx.weights[index] for index in taken]
        if len(taken) == 1:
            dx = int4_matmul_dx(rounded[0], weights[0], gs[0], tensors[3 * taken[0] + 1], ctx.backend)
        else:
            a = _concatenated([tensors[3 * index + 1] for index in taken], x.dtype)
            dx = int4_matmul_dx_group(rounded, weights, torch.cat(gs, dim=-1), a, ctx.backend)
    return dx, None, None, None, None, *gradients


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduce_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ·right`` over all tokens, accumulated in float32 or wider: ``[..., P]``, ``[..., Q]`` -> ``[P, Q]``."""
    wide = torch.promote_types(_wide(left.dtype), _wide(dtype))
    left, right = (tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (left, right))
    return (left.t() @ right).to(dtype)


def int4_lora_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    backend: str = "auto",
    known: Tensor | None = None,
) -> Tensor:
    """``Y = X·Wᵀ + bias + scaling·(X·Aᵀ)·Bᵀ``, differentiable in x, bias, lora_a and lora_b.

    Args:
        x: ``[..., K]``; under autocast it is cast to the autocast dtype.
        weight: ``[N, K]``. bias: ``[N]``.
        lora_a: ``[R, K]``. lora_b: ``[N, R]``. Their gradients come in their own dtype, accumulated in float32.
        known: the output, where it is known already, and only the gradients are wanted. It becomes the result.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    outputs = None if known is None else (known,)
    return int4_lora_linears(x, [LoraOperand(weight, bias, lora_a, lora_b, scaling)], backend, outputs)[0]


def int4_lora_linears(
    x: Tensor, operands: Sequence[LoraOperand], backend: str = "auto", known: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """``int4_lora_linear`` of several layers with one input: one launch where a kernel takes them, dX written once."""
    x = autocast_input(x)
    tensors = [tensor for operand in operands for tensor in (operand.bias, operand.lora_a, operand.lora_b)]
    weights = tuple(operand.weight for operand in operands)
    scalings = tuple(operand.scaling for operand in operands)
    with torch.autocast(x.device.type, enabled=False):
        return _Int4LoRAFunction.apply(x, weights, scalings, backend, known, *tensors)


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype in which a linear layer would run here. TypeError for integers."""
    check_floating("x", x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


class Int4Module(nn.Module):
    """What the int4 layers share: a frozen weight whose tensors are put in place, and replaced, from outside."""

    INT4_BUFFERS: ClassVar = ("packed", "scales", "minimum", "codebook")

    in_features: int
    out_features: int
    group_size: int
    backend: str
    compute_dtype: torch.dtype

    def _init_int4(self, weight: Int4Weight, compute_dtype: torch.dtype, backend: str) -> None:
        self.out_features, self.in_features = weight.shape
        self.group_size, self.compute_dtype, self.backend = weight.group_size, compute_dtype, backend
        self.set_int4(weight)

    def _set_packed(self, packed: Tensor) -> None:
        raise NotImplementedError

    def _packed(self) -> Tensor:
        raise NotImplementedError

    def set_int4(self, weight: Int4Weight) -> None:
        """Puts ``weight``'s tensors in place, without a copy."""
        self._set_packed(weight.packed)
        for name in ("scales", "minimum", "codebook"):
            self._buffers[name] = getattr(weight, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``model.to(dtype)`` and its like move the weight, and leave the dtypes of its tensors alone."""
        own = {id(self._buffers[name]) for name in self.INT4_BUFFERS if self._buffers.get(name) is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in own or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Scales may come as their bytes, as ``save_pretrained`` writes them."""
        for name in ("scales", "minimum"):
            own, given = self._buffers.get(name), state_dict.get(prefix + name)
            if own is not None and given is not None and given.dtype == torch.uint8 and given.shape != own.shape:
                state_dict[prefix + name] = given.contiguous().view(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def int4(self) -> Int4Weight:
        """The weight as it lies now."""
        scales, minimum, codebook = (self._buffers[name] for name in ("scales", "minimum", "codebook"))
        assert scales is not None
        return Int4Weight(self._packed(), scales, self.in_features, self.group_size, minimum, codebook)


class RowSource(Protocol):
    """A table that is not in place as a whole."""

    def gather(self, ids: Tensor) -> Int4Weight:
        """Rows ``ids`` (any shape, flattened) on the device."""
        ...

    def segments(self) -> Iterator[tuple[int, Int4Weight]]:
        """All rows in order: the number of the first, and some rows on the device, until the next are asked for."""
        ...


class AbsentWeight(Tensor):
    """A weight with a shape, a dtype and a device, and nothing in it: whoever computes with it is told."""

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> AbsentWeight:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func}: the weight of an int4 embedding or head is not there as a float tensor; for a trainer that "
            f"multiplies by lm_head.weight itself, as TRL's SFTTrainer, use load(..., head='float')"
        )

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


class Int4Table(Int4Module):
    """An int4 module whose ``weight`` other code only asks for its dtype, device and shape.

    Attributes:
        rows: where the rows come from; None where the whole table lies in place.
        device: where ``weight`` is, for a table that does not lie there.
    """

    rows: RowSource | None = None
    device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError(
            "an int4 embedding or head cannot be copied, as PEFT's modules_to_save does to train it: take it out, or, "
            "for the head, load(..., head='float')"
        )

    def _set_packed(self, packed: Tensor) -> None:
        self._parameters.pop("weight", None)
        self._buffers["packed"] = packed

    def _packed(self) -> Tensor:
        packed = self._buffers["packed"]
        assert packed is not None
        return packed

    @property
    def weight(self) -> AbsentWeight:
        device = self.device or self._packed().device
        return AbsentWeight((self.out_features, self.in_features), self.compute_dtype, device)


class Int4Linear(Int4Module, nn.Linear):
    """A frozen linear layer over an int4 weight.

    A subclass of ``nn.Linear`` whose ``weight`` is the packed uint8 tensor: tools that look for a linear layer, such
    as PEFT, find one and leave its weight alone.
    """

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._init_int4(weight, compute_dtype, backend)

    def _set_packed(self, packed: Tensor) -> None:
        self._parameters["weight"] = nn.Parameter(packed, requires_grad=False)

    def _packed(self) -> Tensor:
        return self.weight.data

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        return int4_matmul(x, self.int4(), self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        scheme = self.int4().scheme
        return f"in_features={self.in_features}, out_features={self.out_features}, {scheme}, G={self.group_size}"


class Tape(Protocol):
    """What a block's recompute need not compute again."""

    def known(self, layer: Int4LoRALinear, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for ``x`` at its next call, if it is known."""
        ...

    def passed(self, layer: Int4LoRALinear, y: Tensor) -> None:
        """A call of ``layer`` gave ``y``."""
        ...


class Int4LoRALinear(Int4Linear):
    """``Int4Linear`` with a LoRA adapter: ``lora_A`` ``[R, K]`` (PEFT's initialisation), ``lora_B`` ``[N, R]`` (zeros).

    Attributes:
        fan_in_fan_out: the float layer kept its weight as ``[in, out]``; only who merges the adapter needs to know.
        siblings: the layers that are computed together with this one; see ``siblings``.
        tape: knows outputs of this layer already, or wants to; see ``backprop``.
    """

    fan_in_fan_out = False
    siblings: Siblings | None = None
    tape: Tape | None = None

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight, bias, compute_dtype, backend)
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        device = weight.device if device is None else device
        self.lora_A = nn.Parameter(a.to(device, adapter_dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=adapter_dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.lora_dropout.p > 0:
            # The two branches see different inputs, so the LoRA one has its own operations.
            x = autocast_input(x)
            t = (self.lora_dropout(x) @ self.lora_A.to(x.dtype).t()) * self.scaling
            return int4_matmul(x, self.int4(), self.bias, t, self.lora_B, self.backend)
        y = compute_together([self], x)[0] if self.siblings is None else self.siblings.output_of(self, x)
        if self.tape is not None:
            self.tape.passed(self, y)
        return y

    def operand(self) -> LoraOperand:
        return LoraOperand(self.int4(), self.bias, self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}"


def compute_together(layers: Sequence[Int4LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers with one input; those that a tape knows are not computed, if it knows all of them."""
    known = [None if layer.tape is None else layer.tape.known(layer, x) for layer in layers]
    outputs = tuple(y for y in known if y is not None)
    whole = outputs if len(outputs) == len(layers) else None
    return int4_lora_linears(x, [layer.operand() for layer in layers], layers[0].backend, whole)


class Int4Embedding(Int4Table, nn.Embedding):  # type: ignore[override,misc]
    """A frozen embedding over an int4 table; only the rows asked for are decoded.

    Made from an existing embedding by ``replace_embedding``, which keeps what a subclass adds (a scale, say).
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.rows is None:
            return int4_embedding(input, self.int4(), self.compute_dtype, self.backend)
        places = torch.arange(input.numel(), device=input.device).view(input.shape)
        return int4_embedding(places, self.rows.gather(input), self.compute_dtype, self.backend)


def replace_embedding(module: nn.Embedding, weight: Int4Weight, compute_dtype: torch.dtype, backend: str) -> None:
    """Turns ``module`` into an ``Int4Embedding`` in place.

    A subclass of ``nn.Embedding`` keeps its own forward: its ``super().forward`` then is the int4 one.
    """
    kind = type(module)
    bases = (Int4Embedding,) if kind is nn.Embedding else (kind, Int4Embedding)
    module.__class__ = type(f"Int4{kind.__name__}", bases, {})
    assert isinstance(module, Int4Embedding)
    module._init_int4(weight, compute_dtype, backend)
