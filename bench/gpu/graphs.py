"""Part ``graphs``: blocks as graphs, ``torch.compile(fullgraph=True)`` and a CUDA graph give eager numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import normal

from .block_graphs import block_graphs
from .memory import make_layer
from .operands import close
from .session import Session
from .timed import SAME


def graphs(session: Session) -> None:
    block_graphs(session)
    layer = make_layer(session, *session.sizes.graph_shape)
    (n, k), m = session.sizes.graph_shape, session.sizes.graph_tokens
    x = normal(m, k, dtype=session.dtype, device=session.device).requires_grad_()
    dy = normal(m, n, dtype=session.dtype, device=session.device)

    def step(call: Callable[[Tensor], Tensor] = layer) -> dict[str, Tensor]:
        leaves = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
        y = call(x)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    # Inductor fuses operations and so rounds differently; a graph launches the very same kernels.
    backend = "inductor" if session.on_gpu else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    session.results["compile"] = {"backend": backend} | _agree(session, step(compiled), step(), exact=False)
    session.save(now=True)

    replay, outputs = capture(session, step)
    with torch.no_grad():
        x.copy_(normal(m, k, dtype=session.dtype, device=session.device))
        dy.copy_(normal(m, n, dtype=session.dtype, device=session.device))
    expected = step()
    replay()
    session.results["graph"] = _agree(session, outputs, expected, exact=True)


def capture(session: Session, step: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Returns a function that runs ``step`` again, on a GPU by replaying a graph, and the tensors it writes into."""
    if not session.on_gpu:
        outputs = step()

        def again() -> None:
            for name, value in step().items():
                outputs[name].copy_(value)

        return again, outputs
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


def _agree(session: Session, ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: bool) -> dict[str, Any]:
    session.synchronize()
    found: dict[str, Any] = {}
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if exact else close(ours[name], value, SAME[session.dtype])
        found[name] = same
        if not same:
            session.fail(f"{name} differs from eager's")
    return found
