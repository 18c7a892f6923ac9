"""MLPs by chunks of tokens: what is as wide as an MLP exists for one chunk at a time, forward and backward.

A chunked MLP is one autograd function within its block's recompute. It keeps its input; its backward pass recomputes
and differentiates chunk by chunk, and adds the chunks' gradients up in float32 or wider. Only the order of summation
differs from the whole MLP.

Which modules are MLPs is found when a model is loaded, from their names and by running the modelling code on the meta
device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kernels.panel import spans
from .lora import Int4LoRALinear
from .recompute import RandomState, Recompute, Recording, Replay, Surroundings, Unit
from .skeleton import meta_model, run_on_meta

NAMES = frozenset({"mlp", "ffn", "feed_forward"})


class ChunkedMLP(Unit):
    """Mixed into an MLP's class, before it: its forward by chunks of at most ``tokens`` of all rows' tokens."""

    tokens: int
    inner: Recompute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.numel() == 0:
            return self.whole(*args, **kwargs)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        parts = [None if self.tape is None else self.tape.part(self) for _ in self.spans(x)]
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            return _ChunkedFunction.apply(self, parts, parameters, x, *parameters)
        return self.value(x, parts)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP's own forward; afterwards no layer keeps an output for another."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            for layer in self.modules():
                if isinstance(layer, Int4LoRALinear) and layer.siblings is not None:
                    layer.siblings.forget()

    def spans(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """First and last token of each chunk of ``x``."""
        return spans(x.numel() // x.shape[-1], self.tokens)

    def value(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        """The output, without a graph; as it was kept, or NaN, where the block's recompute needs no more."""
        tape = self.tape
        known = None if tape is None else tape.known(self, x)
        before = RandomState(x.device) if self.training and isinstance(tape, Recording) else None
        y = self._computed(x, parts) if known is None else known
        # Were it kept although it draws random numbers, the recompute of the block would draw others after it.
        if tape is not None and (before is None or not before.changed()):
            tape.passed(self, y)
        return y

    @torch.no_grad()
    def _computed(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        tokens, y = rows(x), None
        for (start, stop), part in zip(self.spans(x), parts, strict=True):
            with self._taping(part):
                piece = self.whole(tokens[:, start:stop])
            if y is None:
                y = piece.new_empty(x.shape)
            rows(y)[:, start:stop] = piece
        assert y is not None
        return y

    def _taping(self, part: Recording | None) -> AbstractContextManager[None]:
        if part is None:
            return nullcontext()
        return self.inner.recorded(part) if isinstance(self.tape, Recording) else self.inner.taped(Replay(part, None))


class _ChunkedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mlp: ChunkedMLP,
        parts: list[Recording | None],
        parameters: list[nn.Parameter],
        x: Tensor,
        *same: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *same)
        ctx.mlp, ctx.parts, ctx.parameters = mlp, parts, parameters
        ctx.surroundings = Surroundings(x.device, random=mlp.training)
        return mlp.value(x, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mlp: ChunkedMLP = ctx.mlp
        x = ctx.saved_tensors[0]
        tokens, grads = rows(x.detach()), rows(dy)
        need_x, *need = ctx.needs_input_grad[3:]
        wanted = [parameter for parameter, needed in zip(ctx.parameters, need, strict=True) if needed]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        totals: list[Tensor | None] = [None] * len(wanted)
        with ctx.surroundings.replayed(), torch.enable_grad(), _leaves(mlp, wanted) as leaves:
            for (start, stop), part in zip(mlp.spans(x), ctx.parts, strict=True):
                piece = tokens[:, start:stop].detach().requires_grad_(need_x)
                y = _recomputed(mlp, piece, part)
                inputs = [piece, *leaves] if need_x else leaves
                found = list(torch.autograd.grad(y, inputs, grads[:, start:stop], allow_unused=True))
                if dx is not None:
                    rows(dx)[:, start:stop] = found.pop(0)
                totals = [_sum(total, more) for total, more in zip(totals, found, strict=True)]
        given = iter(g if g is None else g.to(p.dtype) for g, p in zip(totals, wanted, strict=True))
        return (None, None, None, dx, *(next(given) if needed else None for needed in need))


def rows(x: Tensor) -> Tensor:
    """``[..., H]`` as ``[1, tokens, H]``."""
    return x.reshape(1, -1, x.shape[-1])


def _recomputed(mlp: ChunkedMLP, piece: Tensor, part: Recording | None) -> Tensor:
    """The next chunk's output with a graph. Its value may be NaN; random numbers are drawn on from where they are."""
    random = RandomState(piece.device) if mlp.training else None

    def recompute() -> Tensor:
        if random is not None:
            random.put_back()  # it may be called twice
        return mlp.whole(piece)  # type: ignore[no-any-return]

    return mlp.inner.run(recompute, part)  # type: ignore[no-any-return]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


@contextmanager
def _leaves(mlp: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, leaves of float32 or wider are in the parameters' places.

    So the chunks' gradients are not rounded before they are added up, and hooks on the parameters run once.
    """
    wide = [nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32))) for p in parameters]
    leaf_of = {id(parameter): leaf for parameter, leaf in zip(parameters, wide, strict=True)}
    places = [
        (module, name, parameter)
        for module in mlp.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in leaf_of
    ]
    for module, name, parameter in places:
        module._parameters[name] = leaf_of[id(parameter)]
    try:
        yield wide
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def find_mlps(config: Any, blocks: str) -> list[str]:
    """The paths of the MLPs in the block list ``blocks`` of ``config``'s model that can run by chunks of tokens.

    Such a module has an MLP's name, and its own linear layers, but no attention, no experts and no other parameters.
    Its block gives it one tensor, and it returns one of the same shape.

    Raises:
        ValueError: the modelling code cannot be run on the meta device.
    """
    model = meta_model(config)
    fits: dict[str, bool] = {}

    def watch(path: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            fits[path] = fits.get(path, True) and alone and output.shape == args[0].shape

        module.register_forward_hook(hook, with_kwargs=True)

    for path, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        if path.rpartition(".")[2] in NAMES and _is_mlp(module):
            watch(path, module)
    run_on_meta(model)
    found = [path for path, fit in fits.items() if fit]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _is_mlp(module: nn.Module) -> bool:
    inside = list(module.modules())
    linear = [part for part in inside if type(part) in (nn.Linear, Conv1D)]
    others = [part for part in inside if part not in linear]
    if any("attention" in type(part).__name__.lower() or isinstance(part, nn.ModuleList) for part in others):
        return False
    return len(linear) > 1 and not any(part._parameters for part in others)


def install_mlp_chunks(model: Any, stack: nn.ModuleList, tokens: int | None) -> None:
    """Lets the MLPs in the blocks ``stack`` of ``model`` run by chunks of ``tokens``. 0 or None leaves them whole.

    Before the block engine is made, which has to know them.

    Raises:
        ValueError: ``tokens`` is no such number.
    """
    if tokens is None or tokens == 0:
        return
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"mlp_chunk_tokens must be a whole number of tokens, or 0 for whole MLPs, got {tokens!r}")
    blocks = next(path for path, module in model.named_modules() if module is stack)
    name = type(model).__name__
    try:
        paths = find_mlps(model.config, blocks)
    except ValueError as error:
        warnings.warn(f"{error}; its MLPs run whole, mlp_chunk_tokens={tokens} changes nothing", stacklevel=3)
        return
    for path in paths:
        chunk_mlp(model.get_submodule(path), tokens)
    prefixes = [f"{blocks}.{index}." for index in range(len(stack))]
    without = sum(not any(path.startswith(prefix) for path in paths) for prefix in prefixes)
    if without:
        warnings.warn(
            f"{without} of {len(stack)} blocks of {name} have no MLP that can run by chunks of tokens: theirs run "
            f"whole, whatever mlp_chunk_tokens is",
            stacklevel=3,
        )


def chunk_mlp(module: nn.Module, tokens: int) -> None:
    kind = type(module)
    module.__class__ = type(f"Chunked{kind.__name__}", (ChunkedMLP, kind), {})
    assert isinstance(module, ChunkedMLP)
    module.tokens, module.inner = tokens, Recompute(module)
