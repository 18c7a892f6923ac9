"""The command as a whole: its exit codes, one line for every failure, signals, and what it asks of the process."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from commands import adapter, assert_one_line, assert_refused, evaluate, tell_at_call, train, tune_offline

from mebp_triton.cli import main as main_module
from mebp_triton.cli.main import main
from mebp_triton.cli.parser import COMMANDS
from mebp_triton.convert import recipe
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.system.errors import RunError
from mebp_triton.training import evaluation

OUT_OF_MEMORY = "mebp: error: out of memory: end other programs\n"


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/below/that"])
@pytest.mark.parametrize("command", ["quantize", "merge", "train", "resume", "demo"])
def test_an_output_that_cannot_be_a_directory_is_refused_at_once(mebp, world, tmp_path, monkeypatch, command, below):
    (tmp_path / "file").write_text("mine")
    out = f"{tmp_path / 'file'}{below}"
    for work in ("mebp_triton.convert.quantize.open_source", "mebp_triton.convert.merge.MergedStore"):
        monkeypatch.setattr(work, lambda *arguments: pytest.fail("the work had begun"))
    arguments = {
        "quantize": ["quantize", world / "model", out],
        "merge": ["merge", world / "store", out],
        "train": [*train(world, tmp_path), "--output-dir", out],
        "resume": [*train(world, tmp_path), "--output-dir", out, "--resume"],
        "demo": ["demo", "--output-dir", out],
    }[command]
    assert_refused(mebp, arguments, [str(tmp_path / "file"), "choose another place"], tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("loss is nan"), 1, "mebp: error: loss is nan\n"),
        (RuntimeError("two\nlines"), 1, "mebp: error: RuntimeError: two lines (--debug shows where)\n"),
        (KeyError("x"), 1, "mebp: error: KeyError: 'x' (--debug shows where)\n"),
        (OSError(28, "No space left"), 1, "mebp: error: [Errno 28] No space left (--debug shows where)\n"),
        (OSError(28, "No space left", "run"), 1, "mebp: error: [Errno 28] No space left: 'run'\n"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), 1, OUT_OF_MEMORY),
        (ValueError("a\n  mistake"), 2, "mebp: error: a mistake\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "mebp: error: [Errno 2] No such file: 'x'\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "mebp: error: [Errno 13] Permission denied: 'x'\n"),
        (KeyboardInterrupt(), 130, "mebp: interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_every_failure_has_its_exit_code(mebp, monkeypatch, error, code, line):
    def fail(arguments):
        raise error

    monkeypatch.setattr("mebp_triton.cli.commands.verify.run", fail)
    assert mebp("verify", "store") == (code, "", line)
    if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
        with pytest.raises(type(error)):
            main(["verify", "x", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "store"], "; --resume goes on from the last checkpoint"),
        (["tune"], "; the same command goes on"),
        (["doctor"], ""),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(mebp, monkeypatch, arguments, hint):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mebp_triton.cli.commands.{arguments[0]}.run", interrupted)
    assert mebp(*arguments) == (130, "", f"mebp: interrupted{hint}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_way_out_is_a_flag_of_the_command(mebp, monkeypatch, command):
    def fail(arguments):
        raise MemoryError

    monkeypatch.setattr(f"mebp_triton.cli.commands.{command}.run", fail)
    given = {"quantize": ["a", "b"], "merge": ["a", "b"], "export": ["a", "b", "--to=gguf-lora"]}
    given = (given | {"tune": [], "doctor": [], "demo": []}).get(command, ["a"])
    given += ["--prompt=a"] if command == "generate" else ["--validation-file=a"] if command == "eval" else []
    code, out, err = mebp(command, *given)
    assert (code, out) == (1, "") and "out of memory: " in err
    flags = re.findall(r"--[a-z-]+", err)
    assert flags or command not in ("train", "eval", "generate")
    shown = mebp(command, "--help")[1]
    assert all(flag in shown for flag in flags)


def test_what_standard_output_cannot_encode_is_escaped(monkeypatch):
    """An answer may be in any language, whatever the locale is."""
    place = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(place, encoding="ascii", write_through=True))
    monkeypatch.setattr("mebp_triton.cli.commands.verify.run", lambda arguments: print("é\N{GRINNING FACE}"))
    assert main(["verify", "store"]) == 0 and place.getvalue() == b"\\xe9\\U0001f600\n"


def test_a_mistake_as_json_is_no_json(mebp, tmp_path):
    assert_one_line(mebp("verify", tmp_path / "none", "--json"), "none is not a directory")


def test_a_warning_is_one_line(mebp, monkeypatch):
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # so that it is put back
    monkeypatch.setattr("mebp_triton.cli.commands.verify.run", lambda arguments: warnings.warn("slow", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert mebp("verify", "store") == (0, "", "mebp: warning: slow\n")


def test_lost_pages_are_reported_while_a_command_runs(mebp, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def reporting():
        seen.append("begun")
        yield
        seen.append("ended")

    monkeypatch.setattr(main_module, "reporting_lost_pages", reporting)
    monkeypatch.setattr("mebp_triton.cli.commands.verify.run", lambda arguments: seen.append("run"))
    assert mebp("verify", "store")[0] == 0 and seen == ["begun", "run", "ended"]


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["quantize", "merge", "merge a store", "tune", "eval", "parsing"])
def test_a_signal_ends_a_command_with_one_line_and_leaves_nothing(
    mebp, world, tmp_path, monkeypatch, name, number, code
):
    from mebp_triton.autotune import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    merging = ["merge", world / "store", tmp_path / "out", adapter(world)]
    arguments, owner, function, at = {
        "quantize": (["quantize", world / "model", tmp_path / "out"], recipe, "quantize_matrix", 9),
        "merge": (merging, MergedStore, "pieces", 9),
        "merge a store": ([*merging, "--as-store"], recipe, "round_to_grid", 9),
        "tune": (tune_offline(tmp_path, "--shapes=256x128", "--m=16"), tune, "tune_offline", 1),
        "eval": (evaluate(world, world / "store"), evaluation, "collate", 2),
        "parsing": (["doctor"], main_module, "build_parser", 1),
    }[name]
    tell_at_call(monkeypatch, owner, function, number, at)
    found, out, err = mebp(*arguments)
    hint = "; the same command goes on" if name == "tune" else ""
    assert (found, out, err.splitlines()[-1]) == (code, "", f"mebp: interrupted{hint}")
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


# --- the process ----------------------------------------------------------------------------------------------------


def test_in_a_process_of_its_own(world, tmp_path):
    """As a shell sees it: an answer or a line, no traceback, no library's chatter."""
    code = (
        "import json, sys\n"
        "from mebp_triton.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    print(main(arguments), file=sys.stderr)\n"
    )
    mistake = train(world, tmp_path, train_file="none.txt")
    both = [[str(part) for part in arguments] for arguments in (mistake, evaluate(world, world / "store", "--json"))]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(both)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        "mebp: error: --train-file none.txt: no such file; give a .txt, .jsonl, .json, .csv or .parquet file",
        "2",
    ]
    assert lines[-1] == "0" and json.loads(done.stdout)["windows"] == 4
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1 << 28, 1 << 30])
def test_an_address_space_that_the_libraries_do_not_fit_into(limit):
    program = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "from mebp_triton.cli.main import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"mebp: error: the address space is limited to {limit >> 20} MiB, of which")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_do_not_spin_unless_they_are_told_to(given, found):
    """The variable is there when torch, and with it OpenMP, is first imported."""
    code = (
        "import importlib.abc, os, sys\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('torch', 'transformers'):\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "from mebp_triton.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.meta_path.insert(0, Watch())\n"
        "main(['verify', 'nowhere'])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | given, check=True)
    assert done.stdout.strip() == found
