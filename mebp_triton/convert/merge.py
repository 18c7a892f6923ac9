"""Merges a store with its adapter, into a model directory of 16 or 32 bits, or into a store again.

A merged weight is ``W + scaling * B @ A``, computed in float32 and rounded once. At any time only some rows of a matrix
are in memory; for a new store, one block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.writers.model_directory import write_model_directory
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import Form
from mebp_triton.models.names import persistent_buffers, tensor_shapes
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store, open_store
from mebp_triton.system import atomic

from .other_parts import OtherParts
from .quantize import QuantizeReport, write_store
from .recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Makes a transformers model directory of a store, with its adapter merged in.

    For a store of the language model in a larger one, that is the whole model: the other parts come from the checkpoint
    that the store was made of.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        target: must not exist, or be empty. It appears whole or not at all.
        adapter: a directory in PEFT's format. Without one, the store's own weights are decoded and rounded once.
        dtype: "float32", "bfloat16" or "float16"; by default the config's.
        progress: called with (tensors done, tensors in all).

    Returns:
        The dtype's name.

    Raises:
        ValueError: the adapter does not fit the store, one of them is damaged, or a weight is too large for float16;
            nothing is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)
    configured = str(source.config.get_text_config().dtype).removeprefix("torch.")
    chosen = dtype or (configured if configured in DTYPES else "bfloat16")
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)

    others = OtherParts(source.store, model)

    def saved_dtype(name: str) -> torch.dtype:
        stored = source.dtype(name)
        return DTYPES[chosen] if stored is None or stored.is_floating_point else stored

    def pieces(name: str) -> Iterable[Tensor]:
        return [others.read(name)] if name in others.shapes else source.pieces(name)

    def save_companions(directory: Path) -> None:
        source.save_as(chosen, directory)
        others.save_companions(directory)

    shapes = tensor_shapes(model)
    names = [name for name, _ in model.named_parameters()]
    names += [name for name in persistent_buffers(model) if source.has(name)]
    tensors = {name: (saved_dtype(name), shapes[name]) for name in names}
    tensors |= {name: (DTYPES[chosen], shape) for name, shape in others.shapes.items()}
    write_model_directory(Path(target), tensors, pieces, save_companions, progress)
    return chosen


def merge_to_store(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    form_of_changed: Form | None = None,
) -> QuantizeReport:
    """Makes a store of a store, with its adapter merged in.

    A matrix that the adapter changes a little keeps its scales, and its new values are rounded to their levels so that
    changes smaller than a step are not lost (``kernels.rounding``). Where it changes much, it is quantized anew. The
    rest is taken over bit for bit. What the recipe asks for becomes the form of all matrices that it is asked of.

    Args:
        store, target, adapter: see ``merge``.
        recipe: the form that is asked for; None for nothing.
        progress: called with (matrices done, matrices in all).
        form_of_changed: the form in which each matrix that the adapter changes is quantized anew, unless its own codes
            are wider; None for its own.

    Raises:
        ValueError: see ``merge``; nothing is left behind.
    """
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)

    # With an adapter in them, the weights are those of no other model.
    base = source.store.base if adapter is None else None
    weight = source.store.weight

    def form_of(name: str) -> Form | Int4Weight:
        own = weight(name)
        return own if form_of_changed is None or own.bits > form_of_changed.bits else form_of_changed

    return write_store(source, Path(target), recipe or Recipe(), None, form_of, progress, base)


@dataclass(frozen=True)
class Attempt:
    """A merged store in one form.

    Attributes:
        form: that of the matrices that the adapter changes; None for what ``merge_to_store`` makes without it.
        report: see ``merge_to_store``.
        nbytes: the bytes of all its files.
        loss: what ``loss_of`` said of it.
    """

    form: Form | None
    report: QuantizeReport
    nbytes: int
    loss: float


def merge_to_measured_store(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None,
    forms: Sequence[Form],
    loss_of: Callable[[Path], float],
    highest_loss: float,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Attempt]:
    """Makes the store of ``merge_to_store``, in one form of the changed matrices after another, till its loss is low.

    Args:
        forms: what is tried where the usual store loses too much, the narrowest first.
        loss_of: measures a store.
        highest_loss: the loss that is low enough. If none is, the store with the lowest loss is kept.
        store, target, adapter, recipe, progress: see ``merge_to_store``.

    Returns:
        The attempts, the one that ``target`` holds last.

    Raises:
        ValueError: see ``merge``; nothing is left behind.
    """
    opened = open_store(store)
    attempts: list[Attempt] = []
    with atomic.atomic_directory(Path(target)) as staging:
        best = staging / "best"
        for form in (None, *forms):
            made = staging / "made"
            report = merge_to_store(opened, made, adapter, recipe, progress, form)
            nbytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            attempt = Attempt(form, report, nbytes, loss_of(made))
            if not attempts or attempt.loss < attempts[-1].loss:
                shutil.rmtree(best, ignore_errors=True)
                made.rename(best)
                attempts.append(attempt)
            else:
                shutil.rmtree(made)
                attempts.insert(0, attempt)
            if attempt.loss <= highest_loss:
                break
        for path in list(best.iterdir()):
            path.rename(staging / path.name)
        best.rmdir()
    return attempts
