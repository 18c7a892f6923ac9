"""Every shipped configuration, compiled for its target: what the compiler's output says of it."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.compile import report
from mebp_triton.autotune.rank import unfit
from mebp_triton.kernels.configs import TUNED
from mebp_triton.kernels.tables import M_BUCKETS, SHIPPED, parse_table, read_table

TARGETS = (80, 86, 87, 89, 90, 100, 120)


def shipped(target):
    return read_table(SHIPPED / f"sm_{target}.json", f"sm_{target}")


def distinct():
    """(target, kernel, config) with one of its problems that has the most tokens: HGMMA is asked for from 64 on."""
    found = {}
    for target in TARGETS:
        for problem, entry in sorted(shipped(target).items(), key=lambda item: item[0].m):
            if entry.route is not None:
                found[target, problem.kernel, entry.route] = problem
    return [(target, config, problem) for (target, _, config), problem in found.items()]


def name(value):
    return "-".join(str(field) for field in vars(value).values()) if hasattr(value, "block_m") else None


@pytest.mark.parametrize("target", TARGETS)
def test_tables_are_whole(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = shipped(target)
    for kernel in TUNED:
        assert {problem.m for problem in table if problem.kernel == kernel} == set(M_BUCKETS)
        few = [entry for problem, entry in table.items() if problem.kernel == kernel and problem.m <= 16]
        assert all(entry.route is not None for entry in few), "a few tokens never pay for decoding by panels"
    written = json.loads((SHIPPED / f"sm_{target}.json").read_bytes())
    assert len(written["entries"]) == len(parse_table(written, f"sm_{target}"))


def test_other_targets_have_no_table():
    assert sorted(path.name for path in SHIPPED.glob("*.json")) == sorted(f"sm_{target}.json" for target in TARGETS)


@pytest.mark.parametrize(("target", "config", "problem"), distinct(), ids=name)
def test_a_configuration_is_clean_for_all_it_stands_in_for(target, config, problem):
    """No spills, shared memory within the limit, no integer-to-float conversions, HGMMA on sm_90."""
    affine = replace(problem, scheme="affine", group_size=32, dtype=torch.float16)
    codebook = replace(problem, scheme="codebook")
    unscaled = replace(config, scale_sums=False)
    made = report(problem, config, target)
    assert unfit(problem, made) is None
    assert made.unpacking_per_weight is not None and made.unpacking_per_weight < 8
    for wanted, taken, options in (
        (problem, config, {"members": 3, "bias": problem.kernel == "matmul"}),
        (affine, unscaled, {"rank": 64, "bias": problem.kernel == "matmul"}),
        (codebook, unscaled, {"rank": 64}),
    ):
        assert unfit(wanted, report(wanted, taken, target, **options)) is None, (wanted, options)
