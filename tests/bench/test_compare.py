"""The comparison with peers: rounds in turns, ratios within a round, and the same model on every side."""

import importlib.util
import json

import pytest


@pytest.fixture
def compare(bench_path):
    import compare

    return compare


def runs(*rounds, loss=3.0):
    """Runs that take these seconds per step, after a first step that warms up."""
    return [{"step_seconds": [99.0, value, value], "loss_before": loss, "peak_rss_bytes": 1 << 20} for value in rounds]


def test_ratios_are_formed_within_a_round_and_not_from_the_medians(compare):
    summary = compare.summarize({"mebp": runs(1.0, 4.0, 2.0), "float32": runs(2.0, 4.0, 3.0)})
    assert summary["mebp"]["seconds_per_step"] == {"rounds": [1.0, 4.0, 2.0], "median": 2.0, "spread": [1.0, 4.0]}
    assert summary["mebp"]["tokens_per_second_median"] == 255 / 2
    speed = compare.compare(summary, ["mebp", "float32"], 0)["speed"]
    assert speed == {"float32": {"rounds": [2.0, 1.0, 1.5], "median": 1.5, "spread": [1.0, 2.0]}}


def test_beside_busy_loops_each_side_is_compared_under_the_same_load_and_to_itself(compare):
    results = {"mebp": runs(1.0), "mebp beside 2": runs(3.0), "float32": runs(2.0), "float32 beside 2": runs(9.0)}
    found = compare.compare(compare.summarize(results), ["mebp", "float32"], 2)
    assert {name: row["median"] for name, row in found["speed"].items()} == {"float32": 2.0, "float32 beside 2": 3.0}
    assert {name: row["median"] for name, row in found["slowdown"].items()} == {"mebp": 3.0, "float32": 4.5}


@pytest.mark.parametrize(
    ("name", "loss"),
    [("float32", 3.01), ("nf4-float32", 3.4), ("nf4-float32+mebp", 3.11), ("nf4-float32-scalar beside 2", 3.09)],
)
def test_a_side_that_starts_from_another_loss_is_refused(compare, name, loss):
    results = {"mebp": runs(1.0), "nf4-float32": runs(1.0, loss=3.1)}
    compare.check_same(results | {"float32": runs(1.0, loss=3.002), "nf4-float32+mebp": runs(1.0, loss=3.101)})
    with pytest.raises(SystemExit, match="not the same model"):
        compare.check_same(results | {name: runs(1.0, loss=loss)})


def test_rounds_are_reversed_in_turn_and_busy_loops_end_with_their_run(bench_path, monkeypatch):
    import turns

    order, loops = [], []

    def side(name):
        order.append((name, [loop.poll() for loop in loops[-1]]))
        return {}

    class Loops:
        def __init__(self, count):
            self.inner = busy_loops(count)

        def __enter__(self):
            loops.append(self.inner.__enter__())

        def __exit__(self, *error):
            self.inner.__exit__(*error)

    busy_loops = turns.busy_loops
    monkeypatch.setattr(turns, "busy_loops", Loops)
    results = turns.take_turns({name: lambda name=name: side(name) for name in "ab"}, 2, loops=1)
    assert {name: len(found) for name, found in results.items()} == {"a": 2, "a beside 1": 2, "b": 2, "b beside 1": 2}
    assert order == [(name, load) for name in "abba" for load in ([], [None])], "None: the loop runs"
    assert all(loop.returncode is not None for found in loops for loop in found)


def test_bitsandbytes_decodes_without_avx512_the_same_bits_and_then_as_before(bench_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the package bitsandbytes is not installed")
    import bitsandbytes_path
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    before, packed = bitsandbytes_path.path(), quantize_4bit(torch.randn(8, 128), quant_type="nf4")
    expected = dequantize_4bit(*packed)
    with bitsandbytes_path.without_avx512():
        assert bitsandbytes_path.path() == "scalar"
        assert torch.equal(dequantize_4bit(*packed), expected)
    assert bitsandbytes_path.path() == before


def test_a_library_whose_variables_have_no_names_is_refused(bench_path, monkeypatch):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the package bitsandbytes is not installed")
    import bitsandbytes_path

    monkeypatch.setattr(bitsandbytes_path, "symbols", lambda file: {})
    with pytest.raises(RuntimeError, match="cannot be chosen"), bitsandbytes_path.without_avx512():
        pass


def test_a_result_names_the_processor_and_its_features(bench_path):
    from machine import processor_facts

    facts = json.loads(json.dumps(processor_facts()))
    assert facts["processor"] and facts["cpu_count"] >= 1
    assert facts["native"] in (None, "avx2", "avx512", "neon")
    if facts["native"] in ("avx2", "avx512"):
        assert any(flag.startswith(facts["native"]) for flag in facts["flags"])
