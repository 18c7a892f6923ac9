"""The search: what is measured and kept, and how a killed run continues."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune import rank as ranking
from mebp_triton.autotune import results as results_module
from mebp_triton.autotune import tune as module
from mebp_triton.autotune.ceilings import Ceilings
from mebp_triton.autotune.cost_model import LIMITS
from mebp_triton.autotune.log import Record, Trial
from mebp_triton.autotune.measure import Measurement
from mebp_triton.autotune.results import Results, versions
from mebp_triton.autotune.timing import Limits, WallTimer
from mebp_triton.autotune.tune import Machine, model_rank, target_of, tune, tune_offline, winner
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig, default_config
from mebp_triton.kernels.tables import Entry, bucket
from mebp_triton.system import strict_json

MACHINE = Machine(torch.device("cpu"), "A device", Limits(1 << 16, 1 << 30), WallTimer())
PROBLEMS = [Problem(kernel, m, 128, 128, dtype=torch.float32) for kernel in ("matmul", "matmul_dx") for m in (16, 64)]
TILES = [TileConfig(16, 32, 64, num_warps=warps) for warps in (1, 2, 4, 8)]


def rank(problem):
    dropped = Trial(TileConfig(128, 128, 64), reason="spills 8 bytes a thread")
    tiles = [Trial(tile, 10.0 + index, clocks={"issue": 1000}) for index, tile in enumerate(TILES)]
    return [*tiles, Trial(PANEL, 100.0), dropped]


def no_rank(problem):
    raise AssertionError("ranked again")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "tables" / "sm_87.json", "sm_87", strict_json.write_json)


@pytest.fixture
def measured(monkeypatch):
    """Every route takes ``times[route]`` (50 by default). ``order`` lists (problem, route) as they are measured."""

    class Told:
        times = {}
        order = []

    class FakeBench:
        def __init__(self, problem, copies, device, limits):
            self.problem = problem

        def measure(self, route, timer, best_us):
            Told.order.append((self.problem, route))
            time_us = Told.times.get(route, 50.0)
            if isinstance(time_us, str):
                return Measurement(None, reason=time_us)
            return Measurement(time_us, (time_us,), "clearly slower" if time_us > 1.25 * best_us else None)

    Told.times, Told.order = {}, []
    monkeypatch.setattr(module, "Bench", FakeBench)
    monkeypatch.setattr(module, "measure_copy_gb_s", lambda *arguments: 60.0)
    monkeypatch.setattr(module, "measure_matmul_tflop_s", lambda *arguments: 9.0)
    return Told


def test_the_winner_is_kept_and_all_others_are_in_the_log(results, measured):
    measured.times = {TILES[0]: "wrong: not finite", TILES[1]: 20.0, TILES[2]: 12.0, TILES[3]: 1.0, PANEL: 40.0}
    problem = PROBLEMS[0]
    told = []
    assert tune([problem], MACHINE, results, rank, limit=3, progress=lambda *news: told.append(news)) == [problem]
    assert told == [(0, 1, "matmul M=16 128x128"), (1, 1, "")]
    # The three best ranked, the panel and the default are measured. The fourth, though fastest, is beyond the limit.
    assert [route for _, route in measured.order] == [*TILES[:3], PANEL, default_config(problem)]
    (entry,) = results.table().values()
    assert entry == Entry(bucket(problem), TILES[2], "measured", 12.0, "A device", versions())
    log = results.log()
    trials = {trial.route: trial for trial in log.records[bucket(problem)].trials}
    clocks = {"issue": 1000}
    assert trials[TILES[0]] == Trial(TILES[0], 10.0, reason="wrong: not finite", clocks=clocks)
    assert trials[TILES[1]] == Trial(TILES[1], 11.0, 20.0, (20.0,), clocks=clocks)
    assert trials[TILES[3]] == Trial(TILES[3], 13.0, clocks=clocks)
    assert trials[PANEL].reason == "clearly slower" and trials[PANEL].time_us == 40.0
    assert trials[TileConfig(128, 128, 64)].reason == "spills 8 bytes a thread"
    assert log.ceilings == {"A device": Ceilings(60.0, {"float32": 9.0})}


def test_on_a_gpu_panels_are_measured_in_each_size(results, measured):
    """On a CPU torch decodes them, in one size."""
    measured.times = {Panel(64): 30.0, PANEL: 40.0}
    large = Problem("matmul", 2048, 4096, 4096)
    for device, sizes in (("cpu", [PANEL]), ("cuda", [PANEL, Panel(64)])):
        measured.order.clear()
        tune([large], replace(MACHINE, device=torch.device(device)), results, lambda problem: [], force=True)
        assert [route for _, route in measured.order] == [default_config(large), *sizes]
        assert results.table()[bucket(large)].route == sizes[-1]


def test_what_is_slower_or_wrong_never_wins():
    problem = PROBLEMS[0]
    trials = (
        Trial(TILES[0], 1.0, 5.0, (5.0,), "clearly slower"),
        Trial(TILES[1], reason="wrong"),
        Trial(PANEL, 3.0, 9.0),
    )
    assert winner(Record(problem, trials, "A device", {})).route == PANEL
    assert winner(Record(problem, trials[:2], "A device", {})) is None
    static = winner(Record(problem, (Trial(TILES[0], reason="spills"), Trial(TILES[1], 4.0)), None, {}))
    assert (static.route, static.provenance, static.time_us, static.device) == (TILES[1], "static", 4.0, None)


def test_where_nothing_works_there_is_no_entry(results, measured):
    measured.times = dict.fromkeys([*TILES, PANEL, default_config(PROBLEMS[0])], "does not compile")
    tune(PROBLEMS[:1], MACHINE, results, rank)
    assert results.table() == {} and len(results.log().records) == 1


def test_what_does_not_fit_into_memory_has_a_reason(results, measured):
    tune(PROBLEMS[:1], replace(MACHINE, limits=Limits(1 << 16, 1 << 20)), results, rank)
    assert measured.order == [] and results.table() == {}
    assert "may be used" in results.log().records[bucket(PROBLEMS[0])].trials[0].reason


# --- continuing -----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_skipped(results, measured, monkeypatch):
    tune(PROBLEMS[:2], MACHINE, results, rank)
    measured.order.clear()
    assert tune(PROBLEMS, MACHINE, results, rank) == PROBLEMS[2:]
    assert {problem for problem, _ in measured.order} == set(PROBLEMS[2:])
    assert tune(PROBLEMS, MACHINE, results, no_rank) == []
    # It is measured again if forced, on another device, or with other versions.
    assert tune(PROBLEMS, MACHINE, results, no_rank, force=True) == PROBLEMS
    assert tune(PROBLEMS, replace(MACHINE, name="Another"), results, no_rank) == PROBLEMS
    monkeypatch.setattr(results_module, "versions", lambda: {"triton": "99", "torch": "99"})
    assert tune(PROBLEMS, MACHINE, results, no_rank) == PROBLEMS


def test_a_killed_run_goes_on(results, measured):
    def killed(problem):
        if problem == PROBLEMS[2]:
            raise KeyboardInterrupt
        return rank(problem)

    with pytest.raises(KeyboardInterrupt):
        tune(PROBLEMS, MACHINE, results, killed)
    assert set(results.table()) == {bucket(problem) for problem in PROBLEMS[:2]}
    assert tune(PROBLEMS, MACHINE, results, rank) == PROBLEMS[2:]


def test_starts_from_what_was_ranked_elsewhere(results, measured):
    """With the files of an offline run, nothing is compiled or ranked again on the device."""
    assert tune_offline(PROBLEMS, results, rank) == PROBLEMS
    assert {entry.provenance for entry in results.table().values()} == {"static"}
    assert tune_offline(PROBLEMS, results, no_rank) == []
    tune(PROBLEMS[:1], MACHINE, results, no_rank, limit=1)
    assert [route for _, route in measured.order] == [TILES[0], PANEL, default_config(PROBLEMS[0])]
    assert results.table()[bucket(PROBLEMS[0])].provenance == "measured"
    # Ranking again replaces predictions and keeps measurements.
    assert tune_offline(PROBLEMS, results, rank, force=True) == PROBLEMS
    assert results.table()[bucket(PROBLEMS[0])].provenance == "measured"
    assert results.log().records[bucket(PROBLEMS[0])].device == "A device"


def test_what_was_ranked_before_clocks_were_counted_is_ranked_again(results):
    tune_offline(PROBLEMS[:1], results, lambda problem: [replace(one, clocks={}) for one in rank(problem)])
    assert tune_offline(PROBLEMS[:1], results, rank) == PROBLEMS[:1]
    assert tune_offline(PROBLEMS[:1], results, no_rank) == []


def test_a_static_entry_is_measured_besides(results, measured):
    special = TileConfig(32, 64, 64, num_stages=5)
    entry = Entry(bucket(PROBLEMS[0]), special, "static", 1.0, None, versions())
    results.add(entry, Record(PROBLEMS[1], (), None, versions()))
    measured.times = {special: 2.0}
    tune(PROBLEMS[:1], MACHINE, results, rank, limit=1)
    assert results.table()[bucket(PROBLEMS[0])].route == special


def test_measures_for_true(results):
    """Without fakes. On a CPU only panels run, and a tile has a reason instead of a time."""
    on_gpu = torch.cuda.is_available()
    machine = Machine.of(torch.device("cuda", 0)) if on_gpu else MACHINE
    (problem,) = tune(PROBLEMS[:1], machine, results, lambda problem: [], limit=1)
    (entry,) = results.table().values()
    assert entry.provenance == "measured" and entry.time_us > 0 and entry.device == machine.name
    log = results.log()
    assert log.ceilings[machine.name].gb_s > 0 and log.ceilings[machine.name].tflop_s["float32"] > 0
    trials = {trial.route: trial for trial in log.records[bucket(problem)].trials}
    assert trials.keys() == {PANEL, default_config(problem)} and trials[PANEL].time_us > 0
    tile = trials[default_config(problem)]
    assert tile.time_us > 0 if on_gpu else tile.time_us is None and tile.reason


# --- ranking --------------------------------------------------------------------------------------------------------


def test_the_model_of_an_architecture():
    assert [target_of(f"sm_{number}") for number in (75, 87, 88, 103, 121)] == [75, 87, 87, 100, 120]
    for name in ("sm_70", "gfx942", ""):
        with pytest.raises(ValueError, match="no candidates are known for"):
            target_of(name)


def test_candidates_of_the_model(monkeypatch):
    good, greedy = TileConfig(16, 64, 64), TileConfig(128, 128, 128, num_warps=8, num_stages=4)
    monkeypatch.setattr(ranking, "candidates", lambda problem, target: [greedy, good])
    problem = Problem("matmul", 16, 896, 896)
    told = []
    trials = model_rank("sm_86", progress=lambda *news: told.append(news))(problem)
    assert {trial.route for trial in trials if trial.predicted_us} == {good, PANEL} and told == [(1, 2), (2, 2)]
    (dropped,) = [trial for trial in trials if trial.reason]
    assert dropped.route == greedy and dropped.predicted_us is None
    predicted = [trial.predicted_us for trial in trials if trial.predicted_us]
    assert predicted == sorted(predicted)
    (tile,) = [trial for trial in trials if trial.route == good]
    assert set(tile.clocks) == set(LIMITS) and tile.clocks["shared memory"] > 0 and tile.note is None


def test_without_a_device_the_winner_is_executed(results, monkeypatch):
    """A wrong one is not shipped; its reason names the instruction, and a device never tries it."""
    problem, tiles = Problem("matmul", 16, 896, 896), [TileConfig(16, 64, 64), TileConfig(16, 64, 128)]
    monkeypatch.setattr(ranking, "candidates", lambda problem, target: tiles)
    best = winner(Record(problem, tuple(model_rank("sm_86")(problem)), None, {})).route
    fault = "shared race: two threads write at line 70 (matmul.py:140): st.shared.b32 [%r1], %r2"
    monkeypatch.setattr(ranking, "fault", lambda problem, config, *rest: fault if config == best else None)
    ranking._executed.cache_clear()
    tune_offline([problem], results, model_rank("sm_86", execute=True))
    ranking._executed.cache_clear()
    (entry,) = results.table().values()
    assert entry.route in tiles and entry.route != best
    (record,) = results.log().records.values()
    (dropped,) = [trial for trial in record.trials if trial.route == best]
    assert dropped == Trial(best, reason=fault)
    shortlist = module._shortlist(problem, record.trials, 8, [PANEL], entry)
    assert (dropped, False) in shortlist
