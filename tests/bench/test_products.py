"""The products that are timed on a CPU: every side computes the same, and ratios are formed within a round."""

import importlib.util

import pytest
import torch


@pytest.fixture
def products(bench_path):
    import products

    return products


def test_every_side_of_every_group_is_checked_and_timed(products):
    record = products.record(2, shapes=((128, 64),), tokens=(1, 3), head=(256, 64))
    sides = {"ours", "torch"} | ({"plain"} if products.native.instructions() else set())
    if importlib.util.find_spec("bitsandbytes") is not None:
        sides |= {"ours_nf4", "bitsandbytes"} | ({"plain_nf4"} if products.native.instructions() else set())
        sides |= {"bitsandbytes_scalar"} if products.bitsandbytes_path.path() == "avx512" else set()
    found: dict[str, set[str]] = {}
    for entry in record["benchmarks"]:
        assert len(entry["samples_seconds"]) == 2 and entry["median_seconds"] > 0
        found.setdefault(f"{entry['group']} {entry['problem']}", set()).add(entry["side"])
    loss = found.pop("loss, forward and backward M=256, 256 x 64")
    assert loss == {side for side in sides if side in ("ours", "torch", "plain")}
    assert len(found) == 3 * 2 and all(names == sides for names in found.values())


def test_a_side_that_computes_something_else_is_refused(products):
    weights = products.Weights(128, 64, with_nf4=False)
    with pytest.raises(SystemExit, match="ours computes something else"):
        weights.sides(lambda weight: lambda: torch.zeros(128, 64), lambda decoded: lambda: decoded, lambda *given: None)


def test_the_table_has_the_ratios_of_each_round(bench_path):
    from kernel_table import ratio_table

    samples = {"ours": [1.0, 4.0, 2.0], "torch": [2.0, 4.0, 8.0]}
    entries = [
        {"group": "dX", "problem": "M=1", "side": side, "samples_seconds": values} for side, values in samples.items()
    ]
    lines = ratio_table({"benchmarks": entries})
    assert lines[0] == "|  | problem | ours / torch |" and lines[2:] == ["| dX | M=1 | 0.5 (0.25 to 1) |"]
