"""Part ``profile``: one training step of ours and one of the peer's: launches, busy share, and where the time goes.

Sides and model are those of part ``training``. On a CPU, a rehearsal counts operations in place of kernels.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .session import Session
from .stores import random_store
from .training import SIDES, one_step

LONGEST = 30
WARM_STEPS = 2


def profiles(session: Session) -> None:
    rows = session.results["rows"] = []
    session.results["not_run"] = {}
    name, config = next(iter(session.sizes.models.items()))
    store = random_store(session, name, config)
    for side in session.while_time("sides", ["mebp", "peft_nf4"]):
        try:
            rows.append({"model": name, "side": side} | profile_side(session, side, store))
        except (ImportError, torch.OutOfMemoryError) as error:
            session.results["not_run"][side] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        gc.collect()
        if session.on_gpu:
            torch.cuda.empty_cache()


def profile_side(session: Session, side: str, store: Path) -> dict[str, Any]:
    """Profiles the step after ``WARM_STEPS`` others, and times one without the profiler, which slows the host down."""
    model, length = SIDES[side](session, store), session.sizes.sequence_lengths[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(session.device)
    for _ in range(WARM_STEPS):
        one_step(model, optimizer, ids)
    session.synchronize()
    started = time.perf_counter()
    one_step(model, optimizer, ids)
    host = time.perf_counter() - started  # the loss is fetched, so most of the device's work is in it
    session.synchronize()
    whole = time.perf_counter() - started
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.on_gpu else [])
    with profile(activities=activities) as recorded:
        one_step(model, optimizer, ids)
        session.synchronize()
    return {"sequence_length": length, "host_seconds": host, "step_seconds": whole} | summary(session, recorded, whole)


def summary(session: Session, recorded: Any, whole: float) -> dict[str, Any]:
    """Launches, the share of a step in which the device is busy, and the kernels that take longest."""
    wanted = DeviceType.CUDA if session.on_gpu else DeviceType.CPU
    micros: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == wanted and not event.is_user_annotation:
            micros[event.name] += event.self_device_time_total if session.on_gpu else event.self_cpu_time_total
            counts[event.name] += 1
    busy = sum(micros.values()) / 1e6
    return {
        "launches": sum(counts.values()),
        "busy_seconds": busy,
        "busy_share": busy / whole,
        "longest": [{"name": n[:120], "us": us, "count": counts[n]} for n, us in micros.most_common(LONGEST)],
    }
