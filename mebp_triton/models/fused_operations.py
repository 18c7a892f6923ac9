"""Puts kernels in the place of chains of small operations, where a block's own code is seen to compute the same.

A block launches some forty small kernels besides its products: norms, rotary embeddings, the middle of its MLP. What a
module computes is seen by running its code over random numbers, on a copy without weights, and comparing the result
with a kernel's plain twin, rounding included. So no architecture is named here, and what is not recognised stays as it
is. A module that is recognised gets a class before its own. It runs the kernel for activations like those that were
tried, and in every other case the module's own code: in float32 for a model in bfloat16, for a norm that is trained,
under a compiler.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mebp_triton.kernels import reference
from mebp_triton.kernels.reference import Activation, NormStyle

from .operation_kernels import Where

# Sizes of the rows that are tried: every eps in use is far below the first, and above the square of the last.
ROW_SIZES = (100.0, 1.0, 3e-3, 1e-3, 1e-6)
# Sizes of the rows that an MLP's linear layers give when it is tried. The last is far above the limits, such as 7 and
# 10, to which some MLPs clamp gate and up.
OUTPUT_SIZES = (3.0, 3.0, 30.0)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: where it was tried, the names of its parameter and of the attribute with its eps, how it rounds."""

    where: Where
    weight_name: str
    eps_name: str
    style: NormStyle


@dataclass(frozen=True)
class Middle:
    """What an MLP does between its linear layers.

    Attributes:
        where: what was tried.
        before: names of the layers that read the input, in the order of their calls: gate and up, or one for both.
        gate_first: whether the gate is the first of them, or of the one layer's halves.
        after: the name of the layer that reads the product.
        kind: the activation.
    """

    where: Where
    before: tuple[str, ...]
    gate_first: bool
    after: str
    kind: Activation


class FusedRMSNorm(nn.Module):
    """Comes before the class of an RMSNorm."""

    fused: Norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fused = self.fused
        weight = self._parameters.get(fused.weight_name)
        if len(args) == 1 and not kwargs and fused.where.holds(args[0]) and weight is not None:
            (x,) = args
            if x.device == weight.device and fused.where.kernels.takes_norm(x, weight):
                return fused.where.kernels.norm(x, weight, getattr(self, fused.eps_name), fused.style)
        return super().forward(*args, **kwargs)


class FusedMLP(nn.Module):
    """Comes before the class of an MLP. ``passed_by``: the modules by name that the kernel stands for."""

    fused: Middle
    passed_by: list[tuple[str, nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self.fused.where.holds(args[0]) or self._is_watched():
            return super().forward(*args, **kwargs)
        return getattr(self, self.fused.after)(self._product(args[0]))

    def _product(self, x: Tensor) -> Tensor:
        """What the last layer reads. In a function of its own, so that gate and up are gone when that layer runs."""
        fused = self.fused
        outputs = [getattr(self, name)(x) for name in fused.before]
        first, second = outputs if len(outputs) == 2 else outputs[0].tensor_split(2, dim=-1)
        gate, up = (first, second) if fused.gate_first else (second, first)
        kernels = fused.where.kernels
        fits = fused.where.holds(gate, up) and kernels.takes_gate(gate, up, fused.kind)
        return (kernels.gate if fits else reference.gated_activation)(gate, up, fused.kind)

    def _is_watched(self) -> bool:
        """Whether the activation's module was replaced, or a hook on it waits for its output or its gradient."""
        return any(
            self._modules.get(name) is not module
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for name, module in self.passed_by
        )


def install_fused_operations(
    stack: nn.Module, device_type: str, dtype: torch.dtype, kind: type[Tensor] = Tensor, backend: str = "triton"
) -> Counter[str]:
    """Lets the modules in ``stack`` run kernels where these compute the same; weights may be absent.

    MLPs that run by chunks have to be made after this.

    Args:
        stack: a model's blocks.
        device_type: of the devices on which kernels run.
        dtype, kind: of activations; see ``Where``. backend: "triton", or "panel" for compiled code.

    Returns:
        How many modules there are of each kind that was found.
    """
    where, found = Where(device_type, dtype, kind, backend), Counter[str]()
    rotating = functools.cache(functools.partial(_with_kernel, where=where))
    classes: dict[type[nn.Module], type[nn.Module]] = {}

    def put_before(module: nn.Module, name: str, first: Any = None, **methods: Any) -> None:
        own = type(module)
        if own not in classes:
            classes[own] = type(f"Fused{own.__name__}", (own,) if first is None else (first, own), methods)
        module.__class__ = classes[own]
        found[name] += 1

    for module in list(stack.modules()):
        if "forward" in vars(module):
            continue  # somebody wraps it
        if (norm := _norm_of(module, where)) is not None:
            put_before(module, f"norm, {norm.style}", FusedRMSNorm)
            module.fused = norm  # type: ignore[assignment]
        elif (mlp := _mlp_of(module, where)) is not None:
            put_before(module, f"MLP, {mlp.kind}", FusedMLP)
            module.fused = mlp  # type: ignore[assignment]
            linear = {*mlp.before, mlp.after}
            module.passed_by = [  # type: ignore[assignment]
                (name, child) for name, child in module.named_children() if name not in linear
            ]
        elif (forward := rotating(type(module).forward)) is not None:
            put_before(module, "rotary", forward=forward)
    return found


def _agree(found: Any, wanted: Tensor) -> bool:
    """Whether tensors are equal but for the last digit of one number in a hundred; of any in float32."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    units = 4 if wanted.dtype == torch.float32 else 1
    distance = (found.double() - wanted.double()).abs()
    near = distance <= units * torch.finfo(wanted.dtype).eps * wanted.double().abs()
    few = wanted.dtype == torch.float32 or float((distance > 0).double().mean()) <= 0.01
    return bool(near.all()) and few


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, the same in each process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _run(module: nn.Module, x: Tensor, training: bool, **inside: Any) -> Any:
    """What the module's code makes of ``x``, with ``inside`` in place of attributes of its own; None if it fails.

    The module itself is not touched.
    """
    clone = object.__new__(type(module))
    clone.__dict__ = {**vars(module), **inside, "training": training}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return type(module).forward(clone, x)
    except Exception:  # code that is given what it was not made for may raise anything
        return None


def _norm_of(module: nn.Module, where: Where) -> Norm | None:
    """What an RMSNorm is like; None if the module is no such thing, or none that a kernel takes."""
    dtype = where.dtype
    if module._modules or module._buffers or len(module._parameters) != 1:
        return None
    ((name, own),) = module._parameters.items()
    if own is None or own.dim() != 1 or own.dtype != dtype:
        return None
    columns = own.shape[0]
    weight = _normal(columns, dtype=torch.float32).to(dtype)
    x = (_normal(len(ROW_SIZES), 2, columns, dtype=torch.float32) * torch.tensor(ROW_SIZES)[:, None, None]).to(dtype)
    if not where.kernels.takes_norm(x, weight):
        return None
    parameters = {name: nn.Parameter(weight, requires_grad=False)}
    results = [_run(module, x, training, _parameters=parameters) for training in (False, True)]
    for eps_name, eps in vars(module).items():
        if type(eps) is float and 0 <= eps < 1:
            for style in get_args(NormStyle):
                wanted = reference.rms_norm(x, weight, eps, style)
                if all(_agree(result, wanted) for result in results):
                    return Norm(where, name, eps_name, style)
    return None


class _Stub(nn.Module):
    """Stands for a linear layer: notes in ``calls`` what it reads, and gives ``output``."""

    def __init__(self, name: str, output: Tensor, calls: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.name, self.output, self.calls = name, output, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.name, x))
        return self.output


def _mlp_of(module: nn.Module, where: Where) -> Middle | None:
    """What an MLP is like; None if the module is no such thing, or none whose middle a kernel can compute."""
    layers = {name: child for name, child in module._modules.items() if isinstance(child, nn.Linear)}
    inside = sum(len(list(layer.parameters())) for layer in layers.values())
    if len(layers) not in (2, 3) or len(list(module.parameters())) != inside:
        return None
    middle, in_training = (_middle_of(module, layers, where, training) for training in (False, True))
    return middle if middle == in_training else None


def _middle_of(module: nn.Module, layers: dict[str, nn.Linear], where: Where, training: bool) -> Middle | None:
    """What the module does with random outputs of its linear layers, if that can be said."""
    calls: list[tuple[str, Tensor]] = []
    widest = max(layer.out_features for layer in layers.values())
    numbers = _normal(len(layers), len(OUTPUT_SIZES), widest, dtype=torch.float32)
    numbers = (numbers * torch.tensor(OUTPUT_SIZES)[:, None]).to(where.dtype)
    stubs = {
        name: _Stub(name, output[:, : layer.out_features], calls)
        for (name, layer), output in zip(layers.items(), numbers, strict=True)
    }
    x = _normal(len(OUTPUT_SIZES), next(iter(layers.values())).in_features, dtype=where.dtype)
    inside = {
        name: stubs[name] if name in stubs else copy.deepcopy(child).train(training)  # a dropout has a mode of its own
        for name, child in module.named_children()
    }
    result = _run(module, x, training, _modules={**module._modules, **inside})
    if sorted(name for name, _ in calls) != sorted(layers):
        return None
    *before, (after, product) = calls
    if result is not stubs[after].output or any(read is not x for _, read in before):
        return None
    outputs = [stubs[name].output for name, _ in before]
    first, second = outputs if len(outputs) == 2 else outputs[0].tensor_split(2, dim=-1)
    for gate_first, kind in itertools.product((True, False), get_args(Activation)):
        gate, up = (first, second) if gate_first else (second, first)
        if gate.shape == up.shape and _agree(product, reference.gated_activation(gate, up, kind)):
            return Middle(where, tuple(name for name, _ in before), gate_first, after, kind)
    return None


def _with_kernel(forward: Any, where: Where) -> Callable[..., Any] | None:
    """``forward`` with a kernel in the place of the function that rotates q and k; None if it calls none."""
    if not isinstance(forward, types.FunctionType):
        return None
    if (inner := getattr(forward, "__wrapped__", None)) is not None:
        # A decorator's function, which holds the method that it decorates in its closure.
        cells = forward.__closure__ or ()
        made = _with_kernel(inner, where) if any(cell.cell_contents is inner for cell in cells) else None
        if made is None:
            return None
        around = tuple(types.CellType(made) if cell.cell_contents is inner else cell for cell in cells)
        return _copied(forward, forward.__globals__, around)
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        rotation = _rotation(function, where) if isinstance(function, types.FunctionType) else None
        if rotation is not None:
            return _copied(forward, {**forward.__globals__, name: rotation}, forward.__closure__)
    return None


def _copied(function: types.FunctionType, names: dict[str, Any], closure: Any) -> Callable[..., Any]:
    """A function with the same code, and other global names and closure."""
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)


def _takes_four(function: Callable[..., Any]) -> bool:
    """Whether a function needs four arguments: q, k, cos and sin, say."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 4 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed)


def _rotation(function: Callable[..., Any], where: Where) -> Callable[..., Any] | None:
    """Stands for ``function`` of q, k, cos and sin, if it computes what the kernel does, to the bit."""

    def same(rotary: int, dtype: torch.dtype) -> bool:
        q, k = (_normal(2, heads, 5, 16, dtype=where.dtype) for heads in (3, 2))
        # Random angles: the halves of these differ, and what reads one of them alone is seen.
        cos, sin = (_normal(2 + place, 5, rotary, dtype=dtype)[-2:] for place in (0, 1))
        try:
            with torch.no_grad():
                found = function(q, k, cos, sin)
            wanted = reference.rope(q, k, cos, sin)
            return len(found) == 2 and all(
                one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, wanted, strict=True)
            )
        except Exception:  # it may be any function that a forward calls
            return False

    if not _takes_four(function) or not same(16, where.dtype):
        return None
    tried = {
        (dtype, part)
        for dtype in (where.dtype, torch.float32)
        for part in (False, True)
        if same(8 if part else 16, dtype)
    }

    @functools.wraps(function)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and where.holds(q, k) and type(cos) is type(sin) is where.kind:
            known = (cos.dtype, cos.shape[-1] != q.shape[-1]) in tried
            if known and q.device == k.device == cos.device == sin.device and where.kernels.takes_rope(q, k, cos, sin):
                return where.kernels.rope(q, k, cos, sin)
        return function(q, k, cos, sin, *args, **kwargs)

    return rotate
