"""The check of gradients passes here, and sees every fault that is put in."""

import json

import pytest
import torch

from mebp_triton.blocks import backward as backward_module
from mebp_triton.kernels import functions
from mebp_triton.layers import lora_function
from mebp_triton.training import gradient_check

CPU = torch.device("cpu")


def failed(**changes):
    return [f"{row['what']}, {row['dtype']}" for row in gradient_check.run(CPU, **changes) if row["ok"] is False]


def test_everything_is_run_and_passes_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = gradient_check.run(CPU, seconds=600)
    assert torch.equal(torch.get_rng_state(), before)
    json.dumps(rows, allow_nan=False)
    assert [row for row in rows if not row["ok"]] == []
    assert len(rows) == 2 + 5 * 3 * 3 + 3 * 2 * 3 + 2 * 5 * 3
    named = {row["what"] for row in rows}
    assert "embedding, 8 bits, symmetric, groups of 16, 33 tokens" in named
    assert "LoRA layer, 4 bits, codebook, groups of 32, scales of two levels, 1 tokens" in named
    assert "head, 8 bits, symmetric, groups of 64, scales of two levels, 33 tokens" in named
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}


def test_what_there_is_no_time_for_is_said():
    rows = gradient_check.run(CPU, seconds=0)
    assert all(row["ok"] is None for row in rows) and len(rows) > 10


def wrong_group(x, weight, *rest, **options):
    """Scales of the group before."""
    parts = weight.tensors() | {"scales": weight.scales.roll(1, 0)}
    return real_matmul(x, type(weight)(in_features=weight.in_features, group_size=weight.group_size, **parts), *rest)


real_matmul, real_dx = functions.int4_matmul, functions.int4_matmul_dx


FAULTS = {
    "a forward product by another group": (lora_function, "int4_matmul", wrong_group),
    "a gradient of the input that is a thousandth too large": (
        lora_function,
        "int4_matmul_dx",
        lambda *args, **options: real_dx(*args, **options) * 1.001,
    ),
    "a gradient without the adapter's term": (
        lora_function,
        "int4_matmul_dx",
        lambda dy, weight, *rest, **options: real_dx(dy, weight, **options),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_layer_is_seen(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    checks = failed(seconds=600)
    assert "LoRA layer, 4 bits, symmetric, groups of 64, 33 tokens, float32" in checks
    assert "LoRA layer, 8 bits, affine, groups of 32, 33 tokens, float32" in checks
    assert "LoRA layer, 4 bits, codebook, groups of 32, scales of two levels, 33 tokens, float32" in checks
    assert "gradients of blocks, float32" in checks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_seen(monkeypatch, value):
    """Whichever of them it is: the largest of some numbers and NaN may be a number."""
    original = gradient_check.Model.gradients

    def gradients(*args):
        loss, by_name = original(*args)
        next(reversed(by_name.values())).view(-1)[0] = value
        return loss, by_name

    monkeypatch.setattr(gradient_check.Model, "gradients", gradients)
    rows = [row for row in gradient_check.run(CPU, seconds=600) if row["ok"] is False]
    assert [row["what"] for row in rows] == ["gradients of blocks"] * 2
    assert {row["reason"] for row in rows} == {"gradients are not finite"}


def test_a_fault_between_blocks_is_seen(monkeypatch):
    original = backward_module.BlockFunction.backward

    def backward(ctx, *grads):
        return original(ctx, *(grad if grad is None else grad * 1.0001 for grad in grads))

    monkeypatch.setattr(backward_module.BlockFunction, "backward", staticmethod(backward))
    assert failed(seconds=600) == ["gradients of blocks, float32"]


def test_a_check_that_breaks_has_failed(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(functions, "int4_embedding", broken)
    rows = [row for row in gradient_check.run(CPU, seconds=600) if row["ok"] is False]
    assert "embedding, 4 bits, affine, groups of 64, 33 tokens" in {row["what"] for row in rows}
    assert {row["reason"] for row in rows} == {"RuntimeError: no such kernel"}


def test_the_command(mebp, monkeypatch):
    code, out, err = mebp("doctor", "--gradients", "--device=cpu", "--json")
    assert code == 0 and not err and json.loads(out)["failed"] == 0
    monkeypatch.setattr(*FAULTS["a forward product by another group"])
    code, out, err = mebp("doctor", "--gradients", "--device=cpu")
    assert code == 1 and "FAILED" in out and err.count("\n") == 1 and "training here would be wrong" in err
    code, _, err = mebp("doctor", "--gradients", "--device=cpu", "--backend=triton")
    assert code == 2 and "runs on a GPU" in err
