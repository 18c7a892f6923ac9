"""Part ``training``: times whole steps at a real model's shapes, ours against transformers + PEFT + bitsandbytes NF4.

The weights are random, which costs the same time and memory as trained ones. All sides get the same model, so their
first losses must agree: within 5 %, since NF4 quantizes it again.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.cli.peft_baseline import with_adapter
from mebp_triton.kernels.reference import decode
from mebp_triton.store.reader import Store
from mebp_triton.system.memory import peak_resident_bytes
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups

from .session import Session
from .stores import random_store

LORA = {"lora_r": 16, "lora_alpha": 16, "seed": 0}
SAME_LOSS = 0.05


def training(session: Session) -> None:
    session.results |= {"lora": LORA, "not_run": {}, "rows": []}
    sizes = session.sizes
    todo = [(name, side) for name in sizes.models for side in SIDES]
    for name, side in session.while_time("models", todo):
        run_side(session, side, random_store(session, name, sizes.models[name]))
    check_same(session)


def run_side(session: Session, side: str, store: Path) -> None:
    """Runs a side's steps at every length, or records why they cannot run: packages or memory are missing."""
    results = session.results
    try:
        model = SIDES[side](session, store)
        for length in session.while_time(f"{store.name} {side}", session.sizes.sequence_lengths):
            row = {"model": store.name, "side": side, "sequence_length": length}
            results["rows"].append(row | steps(session, model, length, side == LEAST))
    except (ImportError, torch.OutOfMemoryError) as error:
        results["not_run"][f"{store.name} {side}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    model = None
    gc.collect()
    if session.on_gpu:
        torch.cuda.empty_cache()


def check_same(session: Session) -> None:
    """Fails where two sides start from other losses at one length: they do not train the same model then."""
    firsts: dict[tuple[str, int], float] = {}
    for row in session.results["rows"]:
        loss = row["losses"][0]
        other = firsts.setdefault((row["model"], row["sequence_length"]), loss)
        if not abs(loss / other - 1) <= SAME_LOSS:
            session.fail(f"not the same model, or not finite: a first loss of {other}, and of {loss}: {row}")


def ours(session: Session, store: Path, rank: int = LORA["lora_r"], **residency: Any) -> nn.Module:
    lora = mebp.LoraConfig(r=rank, lora_alpha=LORA["lora_alpha"])
    return mebp.load(store, lora=lora, device=session.device, dtype=session.dtype, **residency).train()


def ours_in_files(session: Session, store: Path) -> nn.Module:
    """Ours with weights and block inputs in files."""
    return ours(session, store, weights="file", checkpoints="file")


def ours_in_least_memory(session: Session, store: Path) -> nn.Module:
    """Ours with rank 8, everything in files and chunked MLPs; ``steps`` steps in the backward pass then."""
    return ours(session, store, rank=8, weights="file", checkpoints="file", mlp_chunk_tokens=64)


def peer(session: Session, store: Path) -> Any:
    """transformers' model with the store's decoded weights, quantized by bitsandbytes, under PEFT."""
    import bitsandbytes  # noqa: F401 - missing packages show before the model takes memory
    import peft  # noqa: F401

    opened = Store(store)
    with session.device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(store), dtype=session.dtype)
    with torch.no_grad():
        named = dict(model.named_parameters())
        for name in opened.matrices:
            named[f"{name}.weight"].copy_(decode(opened.weight(name).to(session.device), torch.float32))
        for name in opened.floats:
            named[name].copy_(opened.float_tensor(name))
    del named
    quantize_linears(model, session.dtype)
    if session.on_gpu:
        # Quantizing needed the model in 16 bits, which is no part of a step.
        gc.collect()
        torch.cuda.empty_cache()
    return with_adapter(model, LORA).train()


def quantize_linears(model: Any, dtype: torch.dtype) -> None:
    """Puts frozen NF4 layers of bitsandbytes in the place of all linear layers but the head, ready for PEFT."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, nf4_linear(module, dtype, bitsandbytes))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # PEFT checks this


def nf4_linear(module: nn.Linear, dtype: torch.dtype, bitsandbytes: Any) -> nn.Module:
    has_bias, device = module.bias is not None, module.weight.device
    layer = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # Moving the weight to a device quantizes it, even if it lies there already.
    layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(device)
    layer.bias = module.bias
    return layer


LEAST = "mebp_least_memory"
SIDES: dict[str, Callable[[Session, Path], Any]] = {
    "mebp": ours,
    "peft_nf4": peer,
    "mebp_files": ours_in_files,
    LEAST: ours_in_least_memory,
}


def steps(session: Session, model: Any, length: int, least_memory: bool = False) -> dict[str, Any]:
    """Times forward, backward and AdamW over one sequence; the first step warms up.

    Args:
        least_memory: the moments lie in a file, and each block is stepped in the backward pass.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _steps(session, model, length, Path(scratch) if least_memory else None)


def _steps(session: Session, model: Any, length: int, moments: Path | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(session.device)
    # B is zero at first on all sides, so the first loss is the base model's.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    paged = None
    if moments is not None:
        paged = BlockAdamW(block_groups(model, model.mebp.engine), lr=0.0, residency="file", directory=moments)
    optimizer = paged or torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    seconds, losses = [], []
    for _ in range(session.sizes.steps + 1):
        if session.on_gpu:
            torch.cuda.reset_peak_memory_stats(session.device)
        session.synchronize()
        started = time.perf_counter()
        losses.append(one_step(model, optimizer, ids))
        seconds.append(time.perf_counter() - started)
    return {
        "losses": losses,
        "step_seconds": seconds,
        "tokens_per_second": length / statistics.median(seconds[1:]),
        "peak_device_bytes": torch.cuda.max_memory_allocated(session.device) if session.on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(session.device) if session.on_gpu else None,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def one_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward and AdamW; a paged optimizer steps in the backward pass. Returns the loss."""
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    if isinstance(optimizer, BlockAdamW):
        with optimizer.step_in_backward():
            loss.backward()
    else:
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
