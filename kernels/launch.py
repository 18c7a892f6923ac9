"""Parts that all launches share: a weight's arguments, checks of the operands, and launches that are known already.

Triton looks at every argument of a launch to find its compiled kernel, which takes the host longer than to launch it.
A model makes the same launches in every step, so a group of weights remembers those that were made of it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import MOST_MEMBERS, Kernel, Problem
from .layout import TENSORS, Int4Weight
from .workspace import is_traced

# Launches that are remembered: those without a weight for the whole process, and by each group.
MOST_KNOWN = 1024
# Problems that a group remembers. All layers have the same numbers of tokens in turn, so a few serve a whole step.
MOST_PROBLEMS = 8
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def of_members(values: Sequence[Any], missing: Any = None) -> tuple[Any, ...]:
    """A kernel's argument with one value for each member of a group: a tuple of always ``MOST_MEMBERS`` values.

    A group of two repeats its last value, for a third member without rows. A weight alone is followed by ``missing``.
    """
    filler = values[-1] if len(values) > 1 else missing
    return (*values, *[filler] * (MOST_MEMBERS - len(values)))


def weight_arguments(weights: Sequence[Int4Weight]) -> dict[str, Any]:
    """A kernel's arguments for a group of weights: pointers, sizes and strides by member; flags of the scheme."""

    def strides_of(name: str) -> tuple[int, ...]:
        return of_members([stride_of(getattr(weight, name), 0) for weight in weights], 0)

    return {
        **{f"{name}_of": of_members([getattr(weight, name) for weight in weights]) for name in TENSORS},
        "N_of": (*[weight.out_features for weight in weights], *[0] * (MOST_MEMBERS - len(weights))),
        "stride_sg_of": strides_of("scales"),
        "stride_zg_of": strides_of("minimum"),
        "stride_ug_of": strides_of("super_scales"),
        "stride_vg_of": strides_of("super_minimum"),
        **scheme_arguments(weights[0]),
        "MEMBERS": len(weights),
    }


def stride_of(tensor: Tensor | None, axis: int) -> int:
    """The stride of a tensor that may be missing, and then has 0."""
    return 0 if tensor is None else tensor.stride(axis)


def scheme_arguments(weight: Int4Weight) -> dict[str, Any]:
    """Arguments that are the same for all weights of a launch, as ``can_group`` makes sure."""
    return {
        "stride_pn": weight.packed.stride(0),
        "stride_pj": weight.packed.stride(1),
        "stride_sn": weight.scales.stride(1),
        "stride_zn": stride_of(weight.minimum, 1),
        "stride_un": stride_of(weight.super_scales, 1),
        "stride_vn": stride_of(weight.super_minimum, 1),
        "BITS": weight.bits,
        "GROUP": weight.group_size,
        "HAS_MINIMUM": weight.minimum is not None,
        "HAS_CODEBOOK": weight.codebook is not None,
    }


def in_words(weights: Sequence[Int4Weight]) -> bool:
    """Whether the rows ``[N]`` of all scales and minima of less than four bytes are whole words, which are aligned."""
    named = [(name, tensor) for weight in weights for name, tensor in weight.tensors().items()]
    scales = [tensor for name, tensor in named if name not in ("packed", "codebook") and tensor.element_size() < 4]
    return all(
        tensor.stride(1) == 1
        and (tensor.stride(0) | tensor.shape[1]) * tensor.element_size() % 4 == tensor.data_ptr() % 4 == 0
        for tensor in scales
    )


def column_stride(operands: Sequence[Tensor]) -> int:
    """The stride along N that all operands ``[M, N_i]`` share. One with a single column has none."""
    return next((one.stride(1) for one in operands if one.shape[1] > 1), 1)


def runs_compiled(kernel: Any) -> bool:
    """Whether the kernel may use inline PTX: it may not in Triton's interpreter, nor on ROCm."""
    return isinstance(kernel, triton.runtime.JITFunction) and torch.version.hip is None


def check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is a float tensor of that shape on that device."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the weight is, got {tensor.device}")


def can_group(weights: Sequence[Int4Weight]) -> bool:
    """Whether one launch can take these weights with one input: they may differ in nothing but their rows."""
    return group_of(weights) is not None


def _alike(weights: Sequence[Int4Weight]) -> bool:
    if not 1 <= len(weights) <= MOST_MEMBERS:
        return False
    kinds = {
        (
            weight.in_features,
            weight.group_size,
            weight.scheme,
            weight.bits,
            weight.device,
            weight.packed.stride(),
            *((tensor.dtype, tensor.stride(-1)) for tensor in weight.tensors().values()),
        )
        for weight in weights
    }
    return len(kinds) == 1


class Launches:
    """Launches that were made before.

    Attributes:
        known: by what they follow from: the compiled kernel, all its arguments in order, but None for the operands,
            which differ from call to call, and the operands' places among them.
    """

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Any, list[Any], tuple[int, ...]]] = {}

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        key: tuple[Any, ...],
        operands: dict[str, Any],
        new: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    ) -> None:
        """Launches ``kernel`` on the operands' device, by a known launch where there is one.

        Batches of any number of tokens share a few known launches, so that these take no more memory with each length.

        Args:
            grid: programs along up to three axes.
            key: what arguments and options follow from, besides the kernel, these launches and the operands.
            operands: the arguments of this call by name: tensors, of which the first is one, or tuples of tensors, and
                the number of tokens or what follows from it.
            new: all arguments, and the options of the launch.
        """
        first = _first(operands)
        if is_traced(first):
            return
        # Whatever stands for a launch, such as the emulator or the interpreter, is never passed over.
        key = (type(kernel).run, id(kernel), key, first.get_device(), *_signature(operands.values()))
        known = self.known.get(key)
        with _on_device_of(first):
            if known is None:
                self._launch_new(kernel, grid, key, operands, *new())
                return
            compiled, arguments, places = known
            arguments = arguments.copy()
            for place, operand in zip(places, operands.values(), strict=True):
                arguments[place] = operand
            compiled[(*grid, 1, 1)[:3]](*arguments)

    def _launch_new(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        key: Any,
        operands: dict[str, Any],
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        assert "enable_fp_fusion" in options  # versions of Triton differ in whether they fuse
        compiled = kernel[grid](**given, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            names = kernel.arg_names
            arguments = [None if name in operands else given[name] for name in names]
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            self.known[key] = compiled, arguments, tuple(names.index(name) for name in operands)


class Group(Launches):
    """Weights that one launch takes together, and the launches that were made of them. It does not keep the weights.

    Args:
        weights: at most three, which are alike.

    Attributes:
        sizes: the out-features of each. n: of all together.
    """

    def __init__(self, weights: Sequence[Int4Weight]) -> None:
        super().__init__()
        self.sizes = [weight.out_features for weight in weights]
        self.n = sum(self.sizes)
        head = weights[0]
        self._form = head.in_features, head.scheme, head.group_size
        self._bits = head.bits
        self._problems: dict[Any, Problem] = {}

    def problem(self, kernel: Kernel, m: int, dtype: torch.dtype) -> Problem:
        """The problem that a configuration is chosen for: these weights, so many tokens, this dtype."""
        found = self._problems.get((kernel, m, dtype))
        if found is None:
            if len(self._problems) >= MOST_PROBLEMS:
                self._problems.clear()
            found = self._problems[kernel, m, dtype] = Problem(kernel, m, self.n, *self._form, dtype, self._bits)
        return found


# Launches without a weight.
WEIGHTLESS = Launches()


def forget_launches() -> None:
    """Forgets all launches, where Triton's driver is another one from now on."""
    WEIGHTLESS.known.clear()
    _GROUPS.clear()


def _signature(operands: Iterable[Any]) -> list[Any]:
    """The parts of operands on which compiled code and other arguments depend: all but the number of tokens.

    Triton compiles anew for a number that is 1, for one that is a multiple of 16, and for one that takes 64 bits.
    """
    found: list[Any] = []
    for operand in operands:
        for one in operand if isinstance(operand, tuple) else (operand,):
            if isinstance(one, Tensor):
                found += one.dtype, one.shape[1:], one.stride(), one.data_ptr() % 16
            elif one is None:
                found.append(None)
            else:
                found += one == 1, one % 16 == 0, one >= 1 << 31
    return found


def _first(operands: dict[str, Any]) -> Tensor:
    first = next(iter(operands.values()))
    return first[0] if isinstance(first, tuple) else first  # type: ignore[no-any-return]


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """While active, the tensor's device is the current one, on which Triton launches."""
    return ANYWHERE if _is_single_device() else torch.cuda.device_of(tensor)


ANYWHERE: AbstractContextManager[None] = nullcontext()  # may be entered any number of times


@functools.cache
def _is_single_device() -> bool:
    return torch.cuda.device_count() < 2


# By the identities of their weights. A group goes when one of these does, before another weight can have its identity.
_GROUPS: dict[tuple[int, ...], Group] = {}


def group_of(weights: Sequence[Int4Weight]) -> Group | None:
    """The group that these weights make; None if one launch cannot take them together."""
    key = tuple(map(id, weights))
    found = _GROUPS.get(key)
    if found is None and _alike(weights):
        found = _GROUPS[key] = Group(weights)
        for weight in weights:
            weakref.finalize(weight, _GROUPS.pop, key, None).atexit = False
    return found
