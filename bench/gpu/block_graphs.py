"""In part ``graphs``: a model with blocks as graphs equals one whose blocks run, to the bit; and what time both take.

The first step runs as usual, the second records the graphs, and from the third on they are played.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mebp_triton as mebp
from mebp_triton.blocks.graph_players import DeviceGraph, Player, SameCall
from mebp_triton.blocks.graphs import BlockGraphs

from .session import Session
from .stores import random_store

WARM_UP = 3  # steps before any is timed


def block_graphs(session: Session) -> None:
    rows = session.results["blocks"] = []
    store = random_store(session, "paged", session.sizes.paged_model)
    for weights in session.while_time("blocks", ("device", "host")):
        model = _model(session, store, weights)
        expected, eager, _ = _steps(session, model)
        model = _model(session, store, weights)
        player: Player = DeviceGraph(session.device) if session.on_gpu else SameCall()
        engine = model.mebp.engine
        engine.graphs = graphs = BlockGraphs(engine.blocks, player)
        found, played, reserved = _steps(session, model)
        different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
        row = {"weights": weights, "compared": len(found), "different": len(different)}
        row |= {"made": graphs.made, "played": graphs.played, "static_bytes": graphs.buffers.nbytes()}
        rows.append(row | {"reserved": reserved, "seconds_eager": eager, "seconds_graphs": played})
        if different:
            session.fail(f"blocks as graphs, weights {weights}: {different[0]} differs from that of blocks that run")
        if not graphs.played:
            session.fail(f"blocks as graphs, weights {weights}: none was played")
        session.save(now=True)


def _model(session: Session, store: Path, weights: Any) -> Any:
    torch.manual_seed(0)
    lora = mebp.LoraConfig(r=16, lora_alpha=16)
    model = mebp.load(store, lora, device=session.device, dtype=session.dtype, weights=weights).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
    return model


def _steps(session: Session, model: Any) -> tuple[dict[str, Tensor], float, int]:
    """Losses and gradients of all steps by name, the median seconds of a pass, and the device's reserved bytes."""
    generator, found, seconds = torch.Generator().manual_seed(1), {}, []
    for step in range(WARM_UP + session.sizes.steps):
        shape = 2, session.sizes.paged_tokens
        ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(session.device)
        model.zero_grad()
        session.synchronize()
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        session.synchronize()
        seconds.append(time.perf_counter() - began)
        found[f"loss {step}"] = loss.detach().cpu()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} {name}"] = parameter.grad.cpu()
    reserved = torch.cuda.memory_reserved(session.device) if session.on_gpu else 0
    return found, statistics.median(seconds[WARM_UP:]), reserved
