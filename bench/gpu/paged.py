"""Part ``paged``: runs whose weights and block inputs wait in host memory or in files equal a resident one, to the bit.

Three steps with a learning rate above 0, so that later steps read what earlier ones changed. A copy that is late, an
arena that is overwritten too early, or a block input that is reused shows as a different loss or gradient.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mebp_triton as mebp
from mebp_triton.store.residency import RESIDENCIES
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups

from .session import Session
from .stores import random_store

STEPS, RATE = 3, 1e-2


def paged(session: Session) -> None:
    session.results["rows"] = []
    everywhere = [(place, place, place) for place in RESIDENCIES]
    ways = [(weights, inputs, "device") for weights, inputs in product(RESIDENCIES, RESIDENCIES)]
    compare(session, "dense", session.sizes.paged_model, [*ways, *everywhere[1:]])
    compare(session, "mixture", session.sizes.paged_mixture, everywhere)


def compare(session: Session, model: str, config: dict[str, Any], ways: list[tuple[Any, Any, Any]]) -> None:
    """Runs a model in each of the ways: where weights, block inputs and moments lie. The first is the resident one."""
    store = random_store(session, f"paged-{model}", config)
    with tempfile.TemporaryDirectory() as scratch:
        expected: dict[str, Tensor] = {}
        for weights, block_inputs, moments in session.while_time(f"ways of the {model} model", ways):
            found = dict(run(session, store, Path(scratch), weights, block_inputs, moments))
            expected = expected or found
            different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
            row = {"model": model, "weights": weights, "checkpoints": block_inputs, "optimizer_state": moments}
            session.results["rows"].append(row | {"compared": len(found), "different": len(different)})
            if different or found.keys() != expected.keys():
                session.fail(f"{row} differs from a resident run, first in {(different or ['its names'])[0]}")


def run(
    session: Session, store: Path, scratch: Path, weights: Any, block_inputs: Any, moments: Any
) -> Iterator[tuple[str, Tensor]]:
    """The loss and every gradient of each step, and the parameters after the last, by name."""
    lora = mebp.LoraConfig(r=16, lora_alpha=16)
    where = {"weights": weights, "checkpoints": block_inputs, "scratch_directory": scratch}
    model = mebp.load(store, lora, device=session.device, dtype=session.dtype, **where).train()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = BlockAdamW(block_groups(model, model.mebp.engine), lr=RATE, residency=moments, directory=scratch)
    generator = torch.Generator().manual_seed(0)
    shape = (2, session.sizes.paged_tokens)
    for step in range(STEPS):
        ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(session.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        yield f"loss {step}", loss.detach().cpu()
        for name, parameter in named.items():
            assert parameter.grad is not None
            yield f"gradient {step} {name}", parameter.grad.cpu()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        yield f"value {name}", parameter.detach().cpu()
