"""``mebp eval``: what the run said of its adapter, and what is refused."""

import json

import pytest
from commands import adapter, answer, assert_refused, evaluate, truncated


def test_it_says_of_the_adapter_what_the_run_said(mebp, world):
    record = json.loads((world / "run" / "run.json").read_text())
    command = evaluate(world, world / "store")
    after, before = answer(mebp(*command, adapter(world), "--json")), answer(mebp(*command, "--json"))
    assert (after["loss"], after["token_accuracy"]) == (record["loss_after"], record["token_accuracy_after"])
    assert (before["loss"], before["token_accuracy"]) == (record["loss_before"], record["token_accuracy_before"])
    assert after["loss"] < before["loss"]
    same = answer(mebp(*command, f"--adapter={world / 'run'}", "--json"))
    del same["peak_rss_bytes"], after["peak_rss_bytes"]
    assert same == after, "a run directory has an adapter"
    assert answer(mebp(*command, "--max-eval-windows=2", "--json"))["windows"] == 2
    code, out, err = mebp(*command)
    assert code == 0 and "perplexity" in out and str(world / "held-out.txt") in err


def test_backend_and_dtype_are_taken(mebp, world):
    command = evaluate(world, world / "store", "--max-eval-windows=2", "--device=cpu", "--json")
    losses = [answer(mebp(*command, f"--dtype={dtype}"))["loss"] for dtype in ("float32", "bfloat16")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    code, _, err = mebp(*command, "--backend=triton")
    assert code == 2 and "'triton'" in err


MISTAKES = {
    "no store": (lambda w, t: evaluate(w, t / "none"), ["none is not a directory"]),
    "a truncated store": (lambda w, t: evaluate(w, truncated(w, t)), ["has 500 bytes and should have"]),
    "too long": (lambda w, t: evaluate(w, w / "store", "--max-length=65"), ["--max-length 65", "64"]),
    "no windows": (lambda w, t: evaluate(w, w / "store", "--max-eval-windows=0"), ["--max-eval-windows", "0"]),
    "a missing file": (
        lambda w, t: ["eval", w / "store", f"--validation-file={t / 'none.txt'}"],
        ["none.txt: no such file"],
    ),
    "no file": (lambda w, t: ["eval", w / "store"], ["--validation-file"]),
    "no device": (lambda w, t: evaluate(w, w / "store", "--device=gpu"), ["device must be", "'gpu'"]),
    "an adapter of another family": (
        lambda w, t: evaluate(w, w / "gpt2" / "store", adapter(w)),
        ["matches no linear layer"],
    ),
    "an adapter of another width": (
        lambda w, t: evaluate(w, w / "wide" / "store", adapter(w)),
        ["does not fit this model", "shape"],
    ),
    "no adapter": (
        lambda w, t: evaluate(w, w / "store", f"--adapter={t}"),
        ["is not an adapter", "adapter_config.json"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, typed(world, tmp_path), parts, world, tmp_path)
