"""Traced live bytes are those of the real computation; fake tensors never get out."""

import pytest
import torch
from torch import nn

from mebp_triton.kernels import native, routing, workspace
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig
from mebp_triton.kernels.functions import (
    int4_cross_entropy,
    int4_embedding,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
)
from mebp_triton.kernels.layout import Int4Weight, group_count
from mebp_triton.kernels.tables import Entry, architecture_of, device_architecture
from mebp_triton.kernels.token_products import lora_b_gradients
from mebp_triton.training.plan.live_bytes import LiveBytes, counter_of, traced

MIB = 1 << 20


def weight(rows: int, columns: int, group_size: int = 64) -> Int4Weight:
    packed = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    scales = torch.ones(group_count(columns, group_size), rows, dtype=torch.float16)
    return Int4Weight(packed, scales, columns, group_size)


def test_live_and_peak():
    live = LiveBytes()
    with traced(live):
        a = torch.empty(MIB)  # 4 MiB
        b = a * 2
        assert (live.live, live.peak) == (8 * MIB, 8 * MIB)
        view = b[: MIB // 2]
        del b
        assert live.live == 8 * MIB  # the view holds it
        del view
        assert live.live == 4 * MIB and live.restart() == 8 * MIB and live.peak == 4 * MIB
        a.add_(1)
        assert live.peak == 4 * MIB
        c = a.to(torch.bfloat16)
        assert live.peak == 6 * MIB
    del a, c
    assert live.live == 0


def test_real_tensors_are_no_new_bytes_and_stay_what_they_are():
    real, live = torch.ones(MIB), LiveBytes()
    with traced(live):
        made = real + 1
        assert live.live == 4 * MIB
    assert type(real) is torch.Tensor and bool((real == 1).all())
    assert made.shape == (MIB,)


def test_a_backward_pass_frees_what_it_has_used():
    """x -> W1 -> relu -> W2: at the turn two activations live, at the end the gradients."""
    live = LiveBytes()
    with traced(live):
        layers = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256, bias=False))
        x = torch.empty(512, 256)
        start = live.live
        assert start == 4 * (2 * 256 * 1024 + 512 * 256)
        y = layers(x)
        # relu's output is kept for the backward pass, its input is not.
        assert live.live - start == 4 * 512 * (1024 + 256)
        assert live.peak - start == 4 * 512 * max(2 * 1024, 1024 + 256)
        y.sum().backward()
        del y
        assert live.live - start == 4 * 2 * 256 * 1024


def test_attention_needs_no_square_of_the_length():
    live = LiveBytes()
    with traced(live):
        q = torch.empty(1, 2, 4096, 64, requires_grad=True)
        start = live.restart()
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert live.peak - start < 2 * q.nbytes
        out.sum().backward()


def test_values_that_python_asks_for():
    live = LiveBytes()
    with traced(live):
        x = torch.empty(8)
        assert bool((x > 1).any()) is False and int((x > 1).sum()) == 1 and float(x.sum()) == 1.0
        assert (x > 1).nonzero().shape == (8, 1)  # the largest case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_are_counted(dtype, plain_torch):
    """A product of the opaque operation takes what its twin in plain torch takes, at every call."""
    live = LiveBytes()
    with traced(live):
        w, x = weight(2048, 1024), torch.empty(64, 1024, dtype=dtype)
        base = live.live
        live.restart()
        y = int4_matmul(x, w, backend="panel")
        panel_bytes = workspace.CPU_ELEMENTS * (1 + 4 + (2 if dtype == torch.bfloat16 else 0))
        assert 0 <= live.live - base - y.nbytes - panel_bytes < 4096  # the buffers are kept
        first = live.restart() - base
        assert first > y.nbytes + panel_bytes + 4096
        again = int4_matmul(x, w, backend="panel")
        assert live.restart() - base == first + again.nbytes
        dx = int4_matmul_dx(y, w, backend="panel")
        assert dx.shape == x.shape and 0 <= live.live - base - 2 * y.nbytes - dx.nbytes - panel_bytes < 4096


def test_what_launches_allocate_is_counted_by_the_routes_that_they_will_take(monkeypatch):
    """A panel of the size that the device's table gives, or the parts of a split reduction; nothing that is kept."""
    (m, n, k), parts = (512, 4096, 2048), TileConfig(16, 64, 64, split=4)
    for route in (Panel(1), Panel(4), TileConfig(16, 64, 64), parts):
        problems = [Problem(kernel, m, n, k) for kernel in ("matmul", "matmul_dx")]
        table = {problem: Entry(problem, route, "measured", 1.0, "A GPU", {}) for problem in problems}
        monkeypatch.setattr(routing, "routes_of", lambda architecture, table=table: routing.Routes(table))
        live = LiveBytes(workspace.Workspace(PANEL.elements, keep=False), "sm_87")
        with traced(live):
            w, x = weight(n, k), torch.empty(m, k, dtype=torch.bfloat16)
            base = live.live
            live.restart()
            y = int4_matmul(x, w, backend="triton")
            extra = route.mib * MIB if isinstance(route, Panel) else 4 * y.numel() * route.split * (route.split > 1)
            assert live.restart() - base == y.nbytes + extra
            dx = int4_matmul_dx_group([y, y], [w, w], backend="triton")
            extra = route.mib * MIB if isinstance(route, Panel) else 4 * dx.numel() * route.split * (route.split > 1)
            # A panel of dX is made before the sum of its columns.
            assert dx.nbytes + extra <= live.peak - live.live + dx.nbytes <= dx.nbytes + extra + dx.nbytes
            live.restart()
            (product,) = lora_b_gradients([y], [x[:, :8]], torch.float32, "triton")
            assert live.peak - live.live == 0 and product.shape == (n, 8)
    assert architecture_of(torch.device("cpu")) == ""


def test_the_backend_of_a_run_on_a_device(monkeypatch):
    assert counter_of("cpu", torch.bfloat16, "auto")[1] == "panel"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend, wanted in (("auto", ("unknown", "triton")), ("panel", ("", "panel"))):
        live, resolved = counter_of("cuda", torch.bfloat16, backend)
        assert (live.architecture, resolved) == wanted and not live.workspace.keep
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, wanted in (((8, 7), ("sm_87", "triton")), ((7, 5), ("", "panel"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        device_architecture.cache_clear()
        live, resolved = counter_of("cuda", torch.bfloat16, "auto")
        assert (live.architecture, resolved) == wanted
    device_architecture.cache_clear()


def test_table_and_loss_are_counted():
    live = LiveBytes()
    with traced(live):
        w, ids = weight(4096, 256), torch.zeros(128, dtype=torch.int64)
        hidden = int4_embedding(ids, w, torch.float32, backend="panel").requires_grad_()
        int4_cross_entropy(hidden, w, ids, backend="panel")  # whose buffers stay
        base = live.live
        live.restart()
        losses, argmax = int4_cross_entropy(hidden, w, ids, backend="panel")
        tile = 4 * 128 * 1024
        assert live.peak - base > tile > live.live - base
        losses.sum().backward()
        assert hidden.grad.shape == hidden.shape and argmax.shape == ids.shape


@pytest.mark.skipif(native.instructions() is None, reason="no compiled code for this processor")
def test_what_compiled_code_needs_is_counted():
    live = LiveBytes()
    with traced(live):
        w, x = weight(2048, 1024), torch.empty(64, 1024)
        base = live.live
        y = int4_matmul(x, w, backend="panel")
        kept = live.live - base - y.nbytes
        assert kept == live.workspace.buffers["native", torch.float32].nbytes > x.nbytes
        assert live.peak == live.live


def test_the_panels_own_buffers_stay_real(plain_torch):
    w, x = weight(256, 128), torch.ones(4, 128)
    before = int4_matmul(x, w, backend="panel")
    kept = dict(workspace.workspace().buffers)
    live = LiveBytes()
    with traced(live):
        int4_matmul(torch.empty(4, 128), weight(4096, 512).rows(0, 256).columns(0, 128), backend="panel")
        assert workspace.workspace() is live.workspace
    assert workspace.workspace().buffers == kept and set(map(type, kept.values())) == {torch.Tensor}
    assert set(live.workspace.buffers) == {("codes", torch.uint8), ("values", torch.float32)} <= set(kept)
    assert torch.equal(int4_matmul(x, w, backend="panel"), before)


def test_an_error_within_leaves_nothing_behind():
    w, x = weight(256, 128), torch.ones(4, 128)
    before = int4_matmul(x, w, backend="panel")
    with pytest.raises(RuntimeError), traced(LiveBytes()):
        int4_matmul(torch.empty(4, 128), weight(256, 128), backend="panel")
        torch.empty(2) + torch.empty(3)
    assert torch.equal(int4_matmul(x, w, backend="panel"), before)
