"""A device that launches nothing: Triton's own host code runs, and the backend is chosen as on a GPU."""

import functools
import importlib

import pytest
import torch

from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.functions import int4_matmul
from mebp_triton.kernels.gated_activation import gated_activation_triton
from mebp_triton.kernels.launch import MOST_PROBLEMS, forget_launches, group_of
from mebp_triton.kernels.lora_gradients import lora_gradients_triton
from mebp_triton.kernels.matmul import int4_matmul_group_triton
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_group_triton
from mebp_triton.kernels.rms_norm import rms_norm_dx_triton, rms_norm_triton
from mebp_triton.kernels.rope import rope_triton
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.kernels.tables import architecture_of

CPU = torch.device("cpu")


@pytest.fixture
def stub_device(bench_path):
    return importlib.import_module("stub_device")


def test_launches_are_counted_and_nothing_runs(stub_device):
    weight, x = random_weight(96, 160, CPU), normal(16, 160, dtype=torch.bfloat16, device=CPU)
    names = []
    with stub_device.StubDevice(87, names.append):
        assert architecture_of(CPU) == "sm_87" and resolve_backend("triton", CPU) == "triton"
        assert int4_matmul(x, weight, backend="triton").shape == (16, 96)
        int4_matmul(x, weight, backend="triton")
    assert names[: len(names) // 2] == names[len(names) // 2 :] and names[0] == "_matmul_kernel"


def offset(tensor, elements):
    """The same numbers, so many elements after an aligned address."""
    return torch.cat([torch.zeros(elements, dtype=tensor.dtype), tensor.flatten()])[elements:].view(tensor.shape)


def wider(tensor):
    """The same numbers, as the first columns of twice as many."""
    return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]


def members(count):
    weights = [random_weight(96, 128, CPU, "affine", scale_dtype=torch.int8) for _ in range(count)]
    x, t, b = (
        normal(*shape, dtype=torch.bfloat16, device=CPU) for shape in ((33, 128), (33, 8 * count), (96 * count, 8))
    )
    return weights, x, t, b


@pytest.fixture
def passed(stub_device, monkeypatch):
    """What was launched: the compiled kernel, which a stub device keeps, the grid and the arguments."""
    passed = []

    def counted(kernel, *given):  # the grid, six things of Triton's own, the kernel's arguments
        passed.append((id(kernel), *given[:3], *given[9:]))

    monkeypatch.setattr(stub_device.StubKernel, "counted", counted)
    return passed


def describe(part):
    """Values to compare in the place of tensors."""
    if isinstance(part, tuple):
        return tuple(map(describe, part))
    return (part.dtype, part.shape, part.stride()) if isinstance(part, torch.Tensor) else part


@pytest.fixture
def launches(passed):
    """Launches a product and its dX; returns what was passed, as values to compare, and the tensors among it."""

    def launch(weights, x, t, b, config):
        passed.clear()
        ys = int4_matmul_group_triton(x, weights, None, t, b, config)
        int4_matmul_dx_group_triton([y.clone() for y in ys], weights, t, b.new_zeros(t.shape[1], 128), config)
        return describe(tuple(passed)), [part for one in passed for part in one if isinstance(part, torch.Tensor)]

    return launch


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("split", [1, 4])
def test_a_known_launch_passes_what_triton_would(stub_device, launches, monkeypatch, count, split):
    weights, x, t, b = members(count)
    config = TileConfig(16, 16, 64, split=split)
    compiled, own = [], stub_device.StubDevice.compiled
    monkeypatch.setattr(stub_device.StubDevice, "compiled", lambda *given: compiled.append(given[2]) or own(*given))
    with stub_device.StubDevice(90):
        first, _ = launches(weights, x, t, b, config)
        count_of_first = len(compiled)
        others = x.clone(), t.clone(), b.clone()
        again, tensors = launches(weights, *others, config)
        assert again == first and len(compiled) == count_of_first
        pointers = set(map(id, tensors))
        assert all(id(other) in pointers for other in others) and not {id(x), id(t), id(b)} & pointers
        # What Triton compiles for, and what a launch reads of an operand besides its address.
        inputs = [(one, t, b) for one in (offset(x, 1), wider(x), x.float())]
        for given in (*inputs, (x[:17], t[:17], b), (x, t[:, : 4 * count], b[:, :4])):
            launches(weights, x, t, b, config)
            found, _ = launches(weights, *given, config)
            forget_launches()
            assert launches(weights, *given, config)[0] == found


@pytest.mark.parametrize("split", [1, 4])
def test_batches_of_any_length_share_known_launches(stub_device, launches, split):
    """Rows of data have hundreds of lengths, and a model hundreds of groups: launches of each would take memory."""
    weights, x, t, b = members(2)
    config, lengths = TileConfig(16, 16, 64, split=split), (33, 1, 2, 16, 17, 32, 15, 31)
    with stub_device.StubDevice(90):
        known = [launches(weights, x[:length], t[:length], b, config)[0] for length in lengths]
        # One token, a multiple of 16, and any other number: so many kernels does Triton compile.
        assert len(group_of(weights).known) == 2 * 3
        assert len(group_of(weights)._problems) <= MOST_PROBLEMS < 2 * len(lengths)
        for length, found in zip(lengths, known, strict=True):
            forget_launches()
            assert launches(weights, x[:length], t[:length], b, config)[0] == found


def small_launches():
    """Launches of the small kernels, whose arguments differ in one thing that Triton compiles for, or in sizes."""
    x, w = normal(5, 64, dtype=torch.bfloat16, device=CPU), normal(64, dtype=torch.bfloat16, device=CPU)
    for rows in (x, offset(x, 1), wider(x), x[:1], x.half()):
        for eps, style in ((1e-5, "twice"), (1e-6, "twice"), (1e-5, "offset")):
            yield functools.partial(rms_norm_triton, rows, w.to(rows.dtype), eps, style)
            yield functools.partial(rms_norm_dx_triton, rows, rows, w.to(rows.dtype), eps, style)
        yield functools.partial(gated_activation_triton, rows, rows)
        yield functools.partial(gated_activation_triton, rows, rows, "gelu")
        q = rows.view(1, len(rows), 4, 16).transpose(1, 2)
        for angles in (q[:, 0], q[:, 0].float(), q[:, 0, :, :8]):
            yield functools.partial(rope_triton, q, q[:, :2], angles, angles)
            yield functools.partial(rope_triton, q, q[:, :2], angles, angles, inverse=True)
        for count in (1, 2):
            outs = [torch.empty(64, 8) for _ in range(count)]
            yield functools.partial(lora_gradients_triton, [rows] * count, [rows[:, :8]] * count, outs)


def test_a_known_launch_of_a_small_kernel_passes_what_triton_would(stub_device, passed, monkeypatch):
    cases, known, own = list(small_launches()), [], stub_device.StubKernel.__getitem__
    monkeypatch.setattr(stub_device.StubKernel, "__getitem__", lambda *given: known.append(1) or own(*given))

    def all_passed(before=lambda: None):
        for launch in cases:
            passed.clear()
            before()
            launch()
            yield describe(tuple(passed))

    with stub_device.StubDevice(90):
        list(all_passed())
        known.clear()
        found = list(all_passed())
        assert len(known) == len(cases)
        assert list(all_passed(forget_launches)) == found and len(known) == len(cases)


def test_afterwards_the_cpu_has_no_triton(stub_device):
    with stub_device.StubDevice(90):
        pass
    assert architecture_of(CPU) == ""
    with pytest.raises(ValueError, match="runs on a GPU"):
        resolve_backend("triton", CPU)


def test_a_wrong_argument_of_a_kernel_is_an_error_as_on_a_gpu(stub_device):
    from mebp_triton.kernels.split import _sum_parts_kernel

    with stub_device.StubDevice(90), pytest.raises(TypeError):
        _sum_parts_kernel[(1,)](nothing=1)
