"""``mebp tune``: tables offline and their report, which problems are tuned, and what is refused."""

import pytest
import torch
import transformers
from commands import answer, assert_one_line, assert_refused, put, tune_offline, with_remote_code
from models import ARCHITECTURES, tiny_config

from mebp_triton.autotune import rank
from mebp_triton.autotune import tune as autotune
from mebp_triton.autotune.log import Trial
from mebp_triton.autotune.report import describe_route
from mebp_triton.cli.commands import tune
from mebp_triton.kernels.configs import PANEL, Problem, TileConfig
from mebp_triton.kernels.names import DEFAULT_FORM, Form
from mebp_triton.kernels.routing import Routes
from mebp_triton.kernels.tables import M_BUCKETS, load_tables, read_table
from mebp_triton.store.reader import Store


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    """What tuning does would depend on the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- offline --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_candidates(monkeypatch):
    """Two, so that compiling takes seconds."""
    real = rank.candidates
    monkeypatch.setattr(rank, "candidates", lambda problem, target: real(problem, target)[:2])


def test_offline(mebp, tmp_path, monkeypatch, few_candidates):
    """From nothing to the table that a launch reads, the report and the plot."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["tune", "--offline", "--target=sm_87", "--shapes=256x128", "--m=16", "--limit=2"]
    value = answer(mebp(*command, "--json"))
    table = tmp_path / "mebp-triton" / "tables" / "sm_87.json"
    assert value["table"] == str(table) and value["architecture"] == "sm_87" and value["tuned"] == 2
    assert [(row["kernel"], row["m"], row["n"], row["k"]) for row in value["rows"]] == [
        ("matmul", 16, 256, 128),
        ("matmul_dx", 16, 256, 128),
    ]
    assert all(row["provenance"] == "static" and row["device"] is None and row["of_copy"] < 1 for row in value["rows"])
    assert all(row["bound"] in row["clocks"] and row["note"] is None for row in value["rows"])
    assert len(read_table(table, "sm_87")) == 2
    route = Routes(load_tables("sm_87")).choose(Problem("matmul", 10, 256, 128, *DEFAULT_FORM[:2]))
    assert describe_route(route) == value["rows"][0]["route"]
    # What was ranked is not ranked again; the report shows it.
    assert answer(mebp(*command, "--json"))["tuned"] == 0
    reported = answer(mebp("tune", "--report", "--target=sm_87", "--json", f"--plot={tmp_path / 'plot.png'}"))
    # With all that is shipped.
    assert [row for row in reported["rows"] if row in value["rows"]] == value["rows"]
    assert list(reported["ceilings"]) == ["data sheet"] and all(row["gb_s"] > 0 for row in reported["rows"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = mebp("tune", "--report", "--target=sm_87", "--shapes=256x128", "--m=16")
    assert code == 0 and "256x128" in out and "predicted" in out and "what takes longest in the model" in out
    assert err == "" and "not executed" not in out and "no bound" not in out
    # Nothing is known about what bounds a shipped entry.
    code, out, _ = mebp("tune", "--report", "--target=sm_87", "--shapes=4096x4096", "--m=16")
    assert code == 0 and "no bound: shipped, or logged by an older version" in " ".join(out.split())
    assert_one_line(mebp("tune", "--report", "--target=sm_87", "--shapes=262144x128"), "no such entry")


def test_a_winner_that_was_not_executed_says_so(mebp, tmp_path, monkeypatch):
    """Nothing executes tensor memory."""
    only = TileConfig(16, 64, 128)
    monkeypatch.setattr(rank, "candidates", lambda problem, target: [only])
    command = ["tune", "--offline", "--target=sm_100", "--shapes=16384x16384", "--m=16"]
    command += [f"--output={tmp_path / 'table.json'}"]
    code, out, _ = mebp(*command)
    words = " ".join(out.split())
    assert code == 0 and "+ not executed: line" in words and "tcgen05.alloc" in words
    assert [row["note"].partition(":")[0] for row in answer(mebp(*command, "--json"))["rows"]] == ["not executed"] * 2


# --- problems -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(monkeypatch):
    """The problems that would have been ranked: nothing is compiled."""
    problems = []

    def model_rank(architecture, limit=None, progress=None, execute=False):
        return lambda problem: problems.append(problem) or [Trial(PANEL, 1.0)]

    monkeypatch.setattr(autotune, "model_rank", model_rank)
    return problems


def test_a_store(mebp, world, tmp_path, ranked):
    answer(mebp(*tune_offline(tmp_path, f"--store={world / 'store'}", "--m=16", "--json")))
    info = next(iter(Store(world / "store").matrices.values()))
    assert {(p.scheme, p.group_size, p.dtype) for p in ranked} == {(info.scheme, info.group_size, torch.bfloat16)}
    # All shapes of so small a model lie in the smallest buckets, but for the fused gate and up.
    assert {(p.kernel, p.n, p.k) for p in ranked} >= {(kernel, 160, 48) for kernel in ("matmul", "matmul_dx")}
    assert len(read_table(tmp_path / "sm_87.json", "sm_87")) == len(ranked)


def test_a_store_of_8_bits(mebp, shared_store, tmp_path, ranked):
    store = shared_store("llama", scheme="affine", group_size=16, bits=8)
    answer(mebp(*tune_offline(tmp_path, f"--store={store}", "--m=16", "--json")))
    assert {problem.form for problem in ranked} == {Form("affine", 16, 8)}
    ranked.clear()
    answer(mebp(*tune_offline(tmp_path, f"--store={store}", "--m=16", "--scheme=codebook", "--json")))
    assert {problem.form for problem in ranked} == {Form("codebook", 32)}, "a codebook has 4 bits"


@pytest.mark.parametrize(
    ("target", "flag", "dtype"),
    [("sm_75", [], torch.float16), ("sm_90", [], torch.bfloat16), ("sm_75", ["--dtype=float32"], torch.float32)],
)
def test_a_config(mebp, world, tmp_path, ranked, target, flag, dtype):
    command = ["tune", "--offline", f"--target={target}", f"--output={tmp_path / 'table.json'}", "--scheme=affine"]
    answer(mebp(*command, f"--model={world / 'model' / 'config.json'}", "--group-size=128", "--json", *flag))
    assert {(p.scheme, p.group_size, p.dtype) for p in ranked} == {("affine", 128, dtype)}
    assert {p.m for p in ranked} == set(M_BUCKETS)


GROUPS = {
    "llama": [[(48, 48), (24, 48), (24, 48)], [(48, 48)], [(80, 48), (80, 48)], [(48, 80)]],
    "gemma3_text": [[(64, 48), (32, 48), (32, 48)], [(48, 64)], [(80, 48), (80, 48)], [(48, 80)]],
    "gpt2": [[(144, 48)], [(48, 48)], [(192, 48)], [(48, 192)]],
    "phi3": [[(96, 48)], [(48, 48)], [(160, 48)], [(48, 80)]],
    "phi": [[(48, 48), (24, 48), (24, 48)], [(48, 48)], [(80, 48)], [(48, 80)]],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_share_their_input_are_found(architecture):
    groups = tune._shared_inputs(tiny_config(architecture))
    blocks = {tuple(map(tuple, groups[i : i + len(groups) // 3])) for i in range(0, len(groups), len(groups) // 3)}
    assert len(blocks) == 1, "three blocks, all alike"
    if architecture in GROUPS:
        assert sorted(map(list, blocks.pop())) == sorted(GROUPS[architecture])


def test_a_model_that_cannot_be_followed_is_tuned_layer_by_layer(monkeypatch, capsys):
    def fail(*arguments, **named):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    groups = tune._shared_inputs(tiny_config("llama"))
    assert len(groups) == 21 and all(len(group) == 1 for group in groups)
    assert "data-dependent" in capsys.readouterr().err


# --- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no device": (
        lambda w, t: ["tune", "--shapes=64x64", f"--output={t / 'a.json'}"],
        ["no CUDA device here", "--offline --target sm_87"],
    ),
    "another device": (lambda w, t: ["tune", "--shapes=64x64", "--target=sm_90"], ["no CUDA device here"]),
    "offline for nobody": (lambda w, t: ["tune", "--offline", "--shapes=64x64"], ["such as --target sm_87"]),
    "an unknown target": (lambda w, t: ["tune", "--offline", "--target=h100", "--shapes=64x64"], ["'h100'", "sm_90"]),
    "no shapes": (lambda w, t: tune_offline(t), ["--store DIR, --model DIR_OR_CONFIG or --shapes"]),
    "two things": (lambda w, t: tune_offline(t, "--shapes=4x4", f"--store={w / 'store'}"), ["not allowed with"]),
    "a shape that is none": (lambda w, t: tune_offline(t, "--shapes=64x64x64"), ["NxK", "'64x64x64'"]),
    "an M of zero": (lambda w, t: tune_offline(t, "--shapes=64x64", "--m=0"), ["'0'", "1..4096"]),
    "a limit of zero": (
        lambda w, t: tune_offline(t, "--shapes=64x64", "--limit=0"),
        ["--limit: must be a whole number of at least 1, got 0"],
    ),
    "a missing store": (lambda w, t: tune_offline(t, f"--store={t / 'none'}"), ["none is not a directory"]),
    "a missing model": (
        lambda w, t: tune_offline(t, f"--model={t / 'none'}"),
        ["none", "give a transformers model directory"],
    ),
    "a broken config": (
        lambda w, t: tune_offline(t, f"--model={put(t, 'config.json', '{')}"),
        ["config.json is not valid JSON"],
    ),
    "foreign code": (
        lambda w, t: tune_offline(t, f"--model={with_remote_code(w, t)}"),
        ["needs code from the checkpoint, which is never run"],
    ),
    "a directory as table": (
        lambda w, t: ["tune", "--offline", "--target=sm_87", "--shapes=64x64", f"--output={t}"],
        ["is a directory", "--output"],
    ),
    "a table in no directory": (
        lambda w, t: [*tune_offline(t, "--shapes=64x64"), f"--output={t / 'none' / 'a.json'}"],
        ["none is no directory: make it first"],
    ),
    "a plot in no directory": (
        lambda w, t: tune_offline(t, "--shapes=64x64", f"--plot={t / 'none' / 'a.png'}"),
        ["a.png names no file in an existing directory"],
    ),
    "a report of nothing": (
        lambda w, t: ["tune", "--report", "--target=sm_87", f"--output={t / 'a.json'}"],
        ["nothing was tuned for sm_87 yet", "a.json"],
    ),
    "a report that tunes": (lambda w, t: tune_offline(t, "--report"), ["--report tunes nothing"]),
    "a report of no device": (lambda w, t: ["tune", "--report"], ["such as --target sm_87"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, typed(world, tmp_path), parts, world, tmp_path)
