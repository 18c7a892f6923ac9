"""Which backend a name means, and which route a launch takes."""

import functools
import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

from mebp_triton.kernels import matmul, reference, routing, tables
from mebp_triton.kernels.configs import Problem, TileConfig
from mebp_triton.kernels.functions import int4_embedding, int4_matmul, int4_matmul_dx
from mebp_triton.kernels.names import BACKENDS
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.kernels.tables import Entry


def test_auto_means_panels_on_the_cpu_and_triton_on_a_gpu(monkeypatch):
    assert resolve_backend("auto", torch.device("cpu")) == "panel"
    assert resolve_backend("panel", torch.device("cuda")) == "panel"
    assert resolve_backend("auto", torch.device("cuda")) == ("triton" if routing.has_triton() else "panel")
    monkeypatch.setattr(routing, "has_triton", lambda: False)
    assert resolve_backend("auto", torch.device("cuda")) == "panel"
    with pytest.raises(ValueError, match="not installed"):
        resolve_backend("triton", torch.device("cuda"))


@pytest.mark.skipif(not routing.has_triton(), reason="needs the package triton")
def test_triton_on_the_cpu_is_an_error_outside_of_its_interpreter(monkeypatch, make_weight):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = make_weight(7, 70).to("cpu")
    ids = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: int4_matmul(torch.zeros(3, 70), weight, backend="triton"),
        lambda: int4_matmul_dx(torch.zeros(3, 7), weight, backend="triton"),
        lambda: int4_embedding(ids, weight, torch.float32, backend="triton"),
    ):
        with pytest.raises(ValueError, match="runs on a GPU"):
            call()


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_unknown_backends(backend):
    with pytest.raises(ValueError, match=f"one of {', '.join(BACKENDS)}, got {backend!r}"):
        resolve_backend(backend, torch.device("cpu"))


def test_bfloat16_before_sm_80_goes_by_panels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, wanted in (((7, 5), "panel"), ((8, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16) == wanted
        assert resolve_backend("auto", torch.device("cuda"), torch.float16) == "triton"


@pytest.mark.usefixtures("triton_kernels")
def test_what_does_not_fit_the_device_gives_way_to_the_default(make_weight, normal, monkeypatch, device):
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    big = TileConfig(128, 128, 64)
    original = matmul.int4_matmul_triton

    def launch(*operands):
        if operands[-1] == big:
            raise OutOfResources(300_000, 101_376, "shared memory")
        return original(*operands)

    monkeypatch.setattr(matmul, "int4_matmul_triton", launch)
    key = tables.bucket(Problem("matmul", 5, 20, 70, dtype=torch.float32))
    table = {key: Entry(key, big, "static", 1.0, None, {})}
    monkeypatch.setattr(tables, "load_tables", functools.cache(lambda _: table))
    x, weight = normal(5, 70), make_weight(20, 70)
    tables.forget_tables()
    with pytest.warns(UserWarning, match="does not fit this device .* tune again"):
        y = int4_matmul(x, weight, backend="triton")
    torch.testing.assert_close(y, reference.matmul(x, weight), rtol=1e-4, atol=1e-4)
    # From then on at once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(int4_matmul(x, weight, backend="triton"), y)
    tables.forget_tables()
