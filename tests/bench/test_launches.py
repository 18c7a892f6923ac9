"""The counter of launches: what it counts as what, and how many launches a layer of ours may have."""

import importlib
from unittest import mock

import pytest
import torch

# Launches of a layer and pass at a tiny size. The aim is 60.
MOST = {"forward": 21, "recompute": 20, "backward": 33, "update": 1}


@pytest.fixture
def launches(bench_path):
    return importlib.import_module("launches")


def test_a_layer_launches_no_more_than_it_may(launches, tmp_path):
    counted = launches.count("mebp", launches.TINY, 90, tmp_path)["launches"]
    assert all((0 if phase == "update" else 1) <= counted[phase] <= MOST[phase] for phase in MOST), counted


def test_a_pass_that_is_recorded_launches_six_at_most(launches, tmp_path):
    """Two dtypes are copied in, and one or two out. Adapters' gradients are added to the parameters by autograd."""
    counted = launches.count("mebp_graphs", launches.TINY, 90, tmp_path)
    assert counted["launches"] | {"update": 0} == {"forward": 4, "recompute": 0, "backward": 5, "update": 0}
    assert counted["operations"]["forward"]["zero_"] == counted["operations"]["backward"]["zero_"] == 1


def test_an_added_operation_is_counted_in_its_phases(launches, tmp_path):
    from mebp_triton.layers import lora_function

    meter = launches.Meter()
    with launches.stubs(meter, 90, with_peer=False, fused=None):
        step = launches.step_of(meter, launches.ours(launches.TINY, 1, tmp_path), 8)
        step()

        def counted():
            meter.reset()
            with meter:
                step()
            return meter.launches

        before, product = counted(), lora_function.int4_matmul
        with mock.patch.object(lora_function, "int4_matmul", lambda *given: product(*given).neg()):
            after = counted()
    # Of a block's seven layers, o and down are computed alone, and a recompute leaves the last one out.
    assert after - before == {"forward": 2, "recompute": 1} and not before - after


def test_operations_count_as_what_they_launch(launches):
    meter = launches.Meter()
    x = torch.ones(4, 4)
    with meter, meter.during("forward"):
        y = x.view(16)[2:]  # views alone
        torch.empty(3)
        torch.zeros(3)  # 1
        x @ x + x  # 2
        torch.addmm(x, x, x)  # a copy and a product
        torch.addmm(x[0], x, x)  # 1
        torch.cat([y, y])  # 1
        torch._foreach_add_([torch.empty(2) for _ in range(111)], 1.0)  # 110 tensors in a launch
        bool(y.sum() > 0)  # 2, and a copy for which the host waits
    assert meter.launches["forward"] == 1 + 2 + 2 + 1 + 1 + 2 + 3, meter.operations
    assert meter.waits["forward"] == 1
    assert set(meter.seconds) == {"outside", "forward"}


def test_what_lies_in_host_memory_launches_nothing(launches):
    meter = launches.Meter()
    step = torch.zeros(())
    meter.on_host.add(step.data_ptr())
    with meter, meter.during("update"):
        step += 1
        torch.ones(3).to("meta")  # the ones alone
    assert meter.launches["update"] == 1


def test_large_products_are_left_out(launches):
    """So that they take no time; a product of NaN would be NaN."""
    meter = launches.Meter()
    x = torch.full((300, 300), float("nan"))
    with meter, meter.during("forward"), mock.patch.object(torch, "empty"):
        assert (x @ x).shape == (300, 300)
    assert meter.launches["forward"] == 1


def test_what_cannot_be_done_is_refused_before_anything_is_counted(launches, tmp_path, capsys):
    (tmp_path / "text").write_text("no results")
    wrong = {
        "--rounds must be at least 1, got 0": ["--rounds=0"],
        "has no results to add to": [f"--output={tmp_path / 'text'}"],
        "--output cannot be written": [f"--output={tmp_path / 'text' / 'new.json'}"],
    }
    for message, arguments in wrong.items():
        with pytest.raises(SystemExit) as ended:
            launches.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "text").read_text() == "no results"
