"""The sweep over compiled kernels: what it covers, that it goes on where it was, and that a wrong result shows."""

import importlib
import json
from collections import Counter

import pytest
import torch

from mebp_triton.autotune.cases import CASE_KERNELS, LAYOUTS, STYLES, Case
from mebp_triton.autotune.correctness import ALL_OPERATIONS, Verdict, prepare
from mebp_triton.autotune.expert_cases import EXPERT_OPERATIONS
from mebp_triton.autotune.small_operations import OPERATIONS
from mebp_triton.kernels.names import FORMS


@pytest.fixture
def compiled(bench_path):
    return importlib.import_module("compiled")


def test_every_shipped_configuration_has_every_kind_of_weight_and_launch(compiled):
    units = compiled.shipped_units()
    of_each = Counter((unit.configuration, target) for unit in units for target in unit.targets)
    assert len(of_each) == sum(len(compiled.configurations(target)) for target in compiled.TARGETS)
    assert set(of_each.values()) == {2 * 3 * 3 * 2 * 2}
    kinds = {(unit.case.dtype, unit.case.scheme, unit.case.group_size) for unit in units}
    assert len(kinds) == 2 * 3 * 3
    launches = {(len(unit.case.sizes), bool(unit.case.rank), unit.case.layout) for unit in units}
    assert {members for members, *_ in launches} == {1, 2, 3}
    assert {(members > 1, rank, layout) for members, rank, layout in launches} == {
        (False, True, "contiguous"),
        (False, False, "padded"),
        (True, True, "padded"),
        (True, False, "contiguous"),
    }
    assert len({str(unit.case) for unit in units}) == len(units)


def test_random_problems_are_the_same_and_of_all_kinds(compiled):
    units = compiled.random_units()
    assert units == compiled.random_units() and len(units) == len({unit.case for unit in units}) == 1000
    assert {unit.case.kernel for unit in units} == set(CASE_KERNELS) - ALL_OPERATIONS.keys()
    assert {unit.case.layout for unit in units} == set(LAYOUTS)
    assert {target for unit in units for target in unit.targets} == set(compiled.RANDOM_TARGETS)
    configs = [unit.case.config for unit in units if unit.case.config is not None]
    assert {config.split for config in configs} == {1, 2, 4} and any(config.scale_sums for config in configs)


def test_small_problems_are_the_same_and_of_all_kinds(compiled):
    units = compiled.small_units()
    assert units == compiled.small_units() and len(units) == len({unit.case for unit in units}) == 200
    styles = {(kernel, style) for kernel in OPERATIONS for style in STYLES.get(kernel, ("",))}
    assert {(unit.case.kernel, unit.case.style) for unit in units} == styles
    assert {unit.case.layout for unit in units} == set(LAYOUTS)
    targets = {(unit.case.kernel, *unit.targets) for unit in units if unit.case.dtype == torch.bfloat16}
    assert targets == {(kernel, target) for kernel in OPERATIONS for target in compiled.RANDOM_TARGETS[1:]}
    assert compiled.units_of("small") == units


def test_problems_over_experts_are_the_same_and_of_all_kinds(compiled):
    units = compiled.expert_units()
    assert units == compiled.expert_units() and len(units) == len({unit.case for unit in units}) == 200
    assert {unit.case.kernel for unit in units} == EXPERT_OPERATIONS.keys()
    assert {unit.case.layout for unit in units} == set(LAYOUTS)
    assert {(unit.case.scheme, unit.case.bits) for unit in units} == {(form.scheme, form.bits) for form in FORMS}
    assert any(0 in unit.case.sizes for unit in units) and any(not any(unit.case.sizes) for unit in units)
    configs = [unit.case.config for unit in units if unit.case.config is not None]
    assert {config.split for config in configs} == {1} and any(config.scale_sums for config in configs)
    assert compiled.units_of("experts") == units


def test_equal_code_is_executed_once(compiled, monkeypatch):
    """sm_86 and sm_89 have the same code; that of sm_75 copies nothing asynchronously."""
    unit = compiled.Unit(Case("matmul_dx", m=5), (86, 89, 75))
    monkeypatch.setattr(compiled, "units_of", lambda part: [unit])
    row = compiled.run_unit("shipped", 0)
    assert row["executed"] == [86, 75] and not row["faults"] and 0 < row["share"] <= 1
    counts = compiled.counts([(unit, row)])
    assert (counts["launched"], counts["executed"], counts["wrong"]) == (3, 2, 0)


class Wrong:
    """Takes the place of ``prepare``: every result is wrong."""

    def __init__(self, case):
        self.launch = prepare(case).launch

    def judge(self, found):
        return Verdict(False, float("inf"), "3 elements differ")


def test_a_fault_counts_for_all_targets_of_the_code(compiled, monkeypatch):
    unit = compiled.Unit(Case("decode"), (86, 89))
    monkeypatch.setattr(compiled, "units_of", lambda part: [unit])
    monkeypatch.setattr(compiled, "prepare", Wrong)
    row = compiled.run_unit("shipped", 0)
    assert row["executed"] == [86] and [fault["target"] for fault in row["faults"]] == [86, 89]
    assert compiled.counts([(unit, row)])["wrong"] == 2 and compiled.counts([(unit, row)], [89])["wrong"] == 1


@pytest.fixture
def sweep(compiled, monkeypatch, tmp_path):
    """Runs the script over two units of rows, in this process; returns its exit code, its results, and the units."""
    monkeypatch.setattr(compiled, "ProcessPoolExecutor", InThisProcess)
    units = [unit for unit in compiled.random_units() if unit.case.kernel == "decode"][:2]
    monkeypatch.setattr(compiled, "units_of", lambda part: units)
    ran, run_unit = [], compiled.run_unit
    monkeypatch.setattr(compiled, "run_unit", lambda part, number: ran.append(number) or run_unit(part, number))

    def run(*options):
        ran.clear()
        output, progress = tmp_path / "compiled.json", tmp_path / "progress.jsonl"
        paths = ["--output", str(output), "--progress", str(progress)]
        code = compiled.main([*paths, "--part", "random", "--processes", "1", *options])
        return code, json.loads(output.read_text()), list(ran), progress

    return run


class InThisProcess:
    """Takes the place of a pool of processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future


def test_a_run_goes_on_where_it_was(sweep):
    code, record, ran, progress = sweep("--most", "1")
    assert (code, ran, record["random"]["launched"], record["random"]["faults"]) == (0, [0], 1, [])
    with progress.open("a") as file:
        file.write('{"part": "random", "number": 1, "exec')  # the process was killed here
    code, record, ran, _ = sweep()
    assert (code, ran, record["random"]["launched"], record["random"]["wrong"]) == (0, [1], 2, 0)
    assert set(record["random"]["by_kernel"]) == {"decode"}
    assert sweep()[2] == []
    lines = progress.read_text().splitlines()
    progress.write_text("\n".join(['{"sources": "others"}', *lines[1:]]) + "\n")
    assert sweep()[2] == [0, 1]


def test_a_wrong_result_shows(sweep, compiled, monkeypatch):
    monkeypatch.setattr(compiled, "prepare", Wrong)
    code, record, _, _ = sweep()
    assert code == 1 and record["random"]["wrong"] == 2 and record["random"]["worst_share"] == 0
    assert [fault["fault"] for fault in record["random"]["faults"]] == ["3 elements differ"] * 2
