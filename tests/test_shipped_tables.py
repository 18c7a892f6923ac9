"""Shipped tables are whole, and what the compiler makes of their configurations is clean and right.

``bench/ship_tables.py --check`` compiles every configuration for everything that it stands in for, and
``bench/compiled.py`` executes it; these tests do a part of both.
"""

import itertools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from pairs import pairs

from mebp_triton.autotune.cases import tile_case
from mebp_triton.autotune.compile import SHARED_LIMITS, report
from mebp_triton.autotune.correctness import check
from mebp_triton.autotune.emulator.driver import Emulator
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.rank import unfit
from mebp_triton.autotune.space import candidates
from mebp_triton.kernels.configs import TUNED, Problem, TileConfig
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES
from mebp_triton.kernels.tables import M_BUCKETS, SHIPPED, parse_table, read_table

TARGETS = (80, 86, 87, 89, 90, 100, 120)
# Targets whose code is alike, with the same instructions, registers and shared memory.
ALIKE = {87: 86, 89: 86}
# Kinds of weights that an entry stands in for: (changes of the problem, options of its report). The first kind needs
# the most registers, and the second the most shared memory.
KINDS = {
    "affine": ({"scheme": "affine", "group_size": 32, "dtype": torch.float16}, {"rank": 64}),
    "codebook": ({"scheme": "codebook"}, {"rank": 64}),
    "8 bits": ({"scheme": "affine", "group_size": 16, "bits": 8}, {"rank": 64}),
    "two levels": ({"scheme": "affine"}, {"rank": 64, "scale_dtype": torch.int8}),
    "group": ({}, {"members": 3}),
    "plain": ({}, {}),
}


def shipped(target):
    return read_table(SHIPPED / f"sm_{target}.json", f"sm_{target}")


def routes(target):
    """Each configuration of a table by kernel, with the problem of the most tokens: HGMMA is asked for from 64 on."""
    found = {}
    for problem, entry in sorted(shipped(target).items(), key=lambda item: item[0].m):
        if isinstance(entry.route, TileConfig):
            found[problem.kernel, entry.route] = problem
    return found


def cases():
    """The compilations to try: (targets, configuration, problem, kind of weight).

    The targets of ``ALIKE`` share a compilation, and so do configurations that differ only in their split and in their
    stages, of which the most are taken. Kinds take turns, large tiles first.
    """
    shared = {}
    for target in TARGETS:
        for (kernel, config), problem in routes(target).items():
            key = ALIKE.get(target, target), kernel, replace(config, split=1, num_stages=1)
            targets, other, _ = shared.setdefault(key, (set(), config, problem))
            split, stages = max(config.split, other.split), max(config.num_stages, other.num_stages)
            shared[key] = targets | {target}, replace(config, split=split, num_stages=stages), problem
    found = sorted(shared.items(), key=lambda item: (*item[0][:2], -item[0][2].block_n * item[0][2].block_m))
    for (_, (targets, config, problem)), kind in zip(found, itertools.cycle(KINDS), strict=False):
        yield sorted(targets), config, problem, kind


def name(value):
    if isinstance(value, TileConfig):
        return "-".join(str(field) for field in vars(value).values())
    return value.kernel if isinstance(value, Problem) else str(value)


@pytest.mark.parametrize("target", TARGETS)
def test_tables_are_whole(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = shipped(target)
    for kernel in TUNED:
        assert {problem.m for problem in table if problem.kernel == kernel} == set(M_BUCKETS)
        few = [entry for problem, entry in table.items() if problem.kernel == kernel and problem.m <= 16]
        assert all(isinstance(entry.route, TileConfig) for entry in few), "panels never pay for a few tokens"
    written = json.loads((SHIPPED / f"sm_{target}.json").read_bytes())
    assert len(written["entries"]) == len(parse_table(written, f"sm_{target}"))


def test_other_targets_have_no_table():
    assert sorted(path.name for path in SHIPPED.glob("*.json")) == sorted(f"sm_{target}.json" for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_is_one_that_the_search_considers(target):
    """And so one whose sums fit into registers, by the cheap rules of the search space."""
    for (kernel, config), problem in routes(target).items():
        assert config in candidates(problem, target), (kernel, config, problem)


@pytest.mark.parametrize(("targets", "config", "problem", "kind"), list(cases()), ids=name)
def test_a_configuration_is_clean_and_right(targets, config, problem, kind):
    """No spills, shared memory within the limit, no integer-to-float conversions, HGMMA on sm_90; and right numbers.

    What is executed is what was compiled for the report.
    """
    changes, options = KINDS[kind]
    problem = replace(problem, **changes)
    config = config if config.suits(problem) else replace(config, scale_sums=False)
    options = {"bias": problem.kernel == "matmul" and kind != "plain", "rank": 16, "members": 1} | options
    made = report(problem, config, targets[0], **options)
    for target in targets:
        assert unfit(problem, replace(made, target_sm=target, shared_limit=SHARED_LIMITS[target])) is None
    assert made.unpacking_per_weight is not None and made.unpacking_per_weight < 8
    weight = {"dtype": problem.dtype, **problem.form._asdict()}
    case = tile_case(problem.kernel, config, aligned=True, **options, **weight)
    if made.loop.tensor == "UTCHMMA":
        with Emulator(targets[0]), pytest.raises(NotModelled, match=r"tcgen05\.alloc"):
            check(case)
    else:
        launch = right(targets[0], case)
        assert "assembled" in vars(launch.compiled), "it was compiled again"


def right(target, case):
    """Executes a case, which must be right, on two tiles each way; returns the launch."""
    with Emulator(target) as emulator:
        verdict = check(case)
    assert verdict.ok, verdict.reason
    launch = emulator.launches[0]
    assert launch.grid[0] >= 4 and launch.grid[1] == case.config.split
    return launch


def other_cases():
    """What ``cases`` leaves out, because a configuration differs in its split or stages alone: (target, case)."""
    executed = {(target, problem.kernel, config) for targets, config, problem, _ in cases() for target in targets}
    kinds = itertools.cycle(pairs(SCHEMES, GROUP_SIZES, (torch.bfloat16, torch.float16), (1, 2, 3), (5, 0)))
    seen = set()
    for target in TARGETS:
        for kernel, config in routes(target):
            key = ALIKE.get(target, target), kernel, config
            if target != 100 and key not in seen and (target, kernel, config) not in executed:
                seen.add(key)
                scheme, group_size, dtype, members, rank = next(kinds)
                scheme = "symmetric" if config.scale_sums else scheme
                weight = {"scheme": scheme, "group_size": group_size, "dtype": dtype}
                yield target, tile_case(kernel, config, False, members, rank=rank, layout="padded", **weight)


@pytest.mark.parametrize(("target", "case"), list(other_cases()), ids=str)
def test_another_split_is_right(target, case):
    """With ragged sizes and views."""
    right(target, case)


def test_kinds_kernels_and_targets_meet():
    """Each two of them."""
    met = [(ALIKE.get(targets[0], targets[0]), problem.kernel, kind) for targets, _, problem, kind in cases()]
    for pair in itertools.combinations(range(3), 2):
        sizes = [len({case[place] for case in met}) for place in pair]
        assert len({tuple(case[place] for place in pair) for case in met}) == sizes[0] * sizes[1]
    assert {kind for *_, kind in met} == KINDS.keys()
