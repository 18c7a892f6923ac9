"""Mutation testing: puts small faults into a module, one at a time, and sees whether its tests notice.

Every mutant runs in a fork of a process that has imported what the tests need, but nothing of the package: there the
import of the module gives the mutated source. No file is changed. A first run of the tests writes down which of them
reach which line, and how long they take; a mutant meets those that reach it, the quickest first, up to the first
failure. One that survives them meets all tests of its files. One in a line that no test reaches has survived.

    python bench/torture/mutate.py --count 120 --output bench/results/torture/mutate.json
    python bench/torture/mutate.py --again bench/results/torture/mutate.json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import Mutant, mutants  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ADDRESS_SPACE = 12 << 30  # bytes, of a mutant
# The module, and the tests that concern it, the quickest first.
MODULES: dict[str, tuple[str, ...]] = {
    "kernels/layout.py": ("kernels/test_layout.py", "kernels/test_reference.py", "test_lora.py"),
    "kernels/reference.py": ("kernels/test_reference.py", "kernels/test_layout.py"),
    "kernels/cross_entropy.py": ("kernels/test_cross_entropy.py", "test_loss.py"),
    "mebp_triton/stores/dynamic8.py": ("stores/test_dynamic8.py", "stores/test_moments.py"),
    "mebp_triton/stores/moments.py": ("stores/test_moments.py", "stores/test_dynamic8.py", "test_optim.py"),
    "mebp_triton/optim.py": ("test_optim.py", "stores/test_moments.py"),
    "mebp_triton/lora.py": ("test_lora.py", "test_siblings.py", "test_loss.py", "test_backprop.py"),
    "mebp_triton/backprop.py": ("test_backprop.py", "test_recompute.py", "test_blocks.py", "test_finite.py"),
    "mebp_triton/selection.py": ("test_selection.py",),
    "mebp_triton/loss.py": ("test_loss.py", "test_backprop.py", "stores/test_rows.py"),
}


@dataclass
class Baseline:
    """What the tests of a module do while it is whole.

    Attributes:
        seconds: of every test.
        reached: by line, the tests that ran it; "" for one that ran outside of any test.
        imported: every module that was there at the end.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[int, list[str]] = field(default_factory=dict)
    imported: list[str] = field(default_factory=list)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that reach it, the quickest first within each file; all, where it runs outside of tests."""
        found = {test for line in mutant.lines for test in self.reached.get(line, ())}
        if "" in found:
            return list(self.seconds)
        files = {test.partition("::")[0] for test in found if "::" not in test}  # reached by a fixture
        return [test for test in self.seconds if test in found or test.partition("::")[0] in files]


class Recorder:
    """A pytest plugin: the time of every test, and the lines of ``source`` that it runs."""

    def __init__(self, source: Path) -> None:
        self.source, self.current = str(source), ""
        self.seconds: dict[str, float] = {}
        self.reached: dict[int, set[str]] = {}

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != self.source:
            return None
        self.reached.setdefault(frame.f_lineno, set()).add(self.current)
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.current = item.nodeid
        try:
            return (yield)
        finally:
            self.current = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        before = self.current
        if fixturedef.scope != "function":
            self.current = before.partition("::")[0]
        try:
            return (yield)
        finally:
            self.current = before

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


class Chosen:
    """A pytest plugin: only these tests, in this order; the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.places = {test: place for place, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.places), key=lambda item: self.places[item.nodeid]
        )

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class MutatedSource(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree instead of its file."""

    def __init__(self, source: Path, tree: ast.Module) -> None:
        self.source, self.tree = source, tree
        path = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        self.name = path if path.startswith("mebp_triton.") else f"mebp_triton.{path}"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.source, loader=self)

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, str(self.source), "exec"), module.__dict__)


def run_pytest(files: tuple[str, ...], plugin: Any, *options: str) -> int:
    paths = [str(ROOT / "tests" / name) for name in files]
    fixed = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark", "--rootdir", str(ROOT)]
    config = ["-c", str(ROOT / "pyproject.toml"), "--basetemp", str(Path.cwd() / "pytest")]
    return int(pytest.main([*fixed, *config, *options, *paths], plugins=[plugin]))


@dataclass
class Child:
    """A fork at work in a folder of its own, which is also its temporary directory."""

    process: int
    folder: Path
    until: float

    def ended(self) -> Any:
        """None while it works; then what it found, "timed out", or how it died."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() > self.until
        if not done and not late:
            return None
        if not done:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        result = self.folder / "result.json"
        found = json.loads(result.read_text()) if result.exists() else f"ended with status {status}"
        shutil.rmtree(self.folder, ignore_errors=True)
        return found if done else "timed out"


def start(work: Callable[[], Any], seconds: float) -> Child:
    """Runs ``work`` in a fork; its output is thrown away."""
    folder = Path(tempfile.mkdtemp(prefix="mutate-"))
    process = os.fork()
    if process:
        return Child(process, folder, time.monotonic() + seconds)
    os.setsid()
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    with open("output.txt", "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        found = work()
        Path("partial.json").write_text(json.dumps(found))
        os.replace("partial.json", "result.json")
    finally:
        os._exit(0)


def wait(child: Child) -> Any:
    while (found := child.ended()) is None:
        time.sleep(0.02)
    return found


def record(source: Path, files: tuple[str, ...]) -> Any:
    recorder = Recorder(source)
    sys.settrace(recorder.trace)
    code = run_pytest(files, recorder)
    sys.settrace(None)
    order = {f"tests/{name}": place for place, name in enumerate(files)}
    key = lambda test: (order[test.partition("::")[0]], recorder.seconds[test])  # noqa: E731
    return {
        "code": code,
        "seconds": {test: recorder.seconds[test] for test in sorted(recorder.seconds, key=key)},
        "reached": {line: sorted(tests) for line, tests in recorder.reached.items()},
        "imported": sorted(sys.modules),
        "output": Path("output.txt").read_text()[-2000:],
    }


def baseline(source: Path, files: tuple[str, ...]) -> Baseline:
    found = wait(start(lambda: record(source, files), 900))
    if not isinstance(found, dict) or found["code"] != 0:
        sys.exit(f"the tests of {source.name} do not pass as they are: {found}")
    reached = {int(line): tests for line, tests in found["reached"].items()}
    return Baseline(found["seconds"], reached, found["imported"])


def import_what_tests_need(names: list[str]) -> None:
    """Of a baseline's modules, those of other packages."""
    own = ("mebp_triton", "tests", "conftest", "mutants", "__main__", "support")
    for name in names:
        if name.partition(".")[0] in own or name in sys.modules:
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert not any(name.startswith("mebp_triton") for name in sys.modules)
    gc.freeze()  # what is there by now is shared with the forks


def attempt(source: Path, tree: ast.Module, mutant: Mutant, tests: list[str]) -> str:
    """ "" if it survives; else the test that notices it, or how the run ends."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    mutant.put_in()
    sys.meta_path.insert(0, MutatedSource(source, tree))
    files = tuple(dict.fromkeys(test.partition("::")[0].removeprefix("tests/") for test in tests))
    chosen = Chosen(tests)
    code = run_pytest(files, chosen, "-x")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError("none of the chosen tests exists")
    return "" if code == 0 else chosen.failed or f"pytest ended with {code}"


def try_mutants(source: Path, tree: ast.Module, tried: list[Mutant], whole: Baseline, jobs: int) -> dict[str, Any]:
    """The outcome of each, and what is counted."""
    waiting = [(mutant, whole.tests(mutant)) for mutant in reversed(tried)]
    running: list[tuple[Child, Mutant, list[str]]] = []
    outcomes: dict[Any, str] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, tests = waiting.pop()
            if not tests:
                outcomes[mutant.key] = "not reached"
                continue
            seconds = 30 + 5 * sum(whole.seconds[test] for test in tests)
            work = lambda m=mutant, t=tests: attempt(source, tree, m, t)  # noqa: E731
            running.append((start(work, seconds), mutant, tests))
        for entry in list(running):
            child, mutant, tests = entry
            found = child.ended()
            if found is None:
                continue
            running.remove(entry)
            if found == "" and len(tests) < len(whole.seconds):
                waiting.append((mutant, list(whole.seconds)))
                continue
            outcomes[mutant.key] = found or "survived"
            show = (
                f"{found or 'SURVIVED':60.60} {source.name}:{mutant.line} {mutant.before[:70]} -> {mutant.after[:70]}"
            )
            print(show, file=sys.stderr, flush=True)
        time.sleep(0.02)
    alive = ("survived", "not reached")
    return {
        "tried": len(tried),
        "killed": sum(found not in (*alive, "timed out") for found in outcomes.values()),
        "timed_out": sum(found == "timed out" for found in outcomes.values()),
        "survived": sum(found in alive for found in outcomes.values()),
        "survivors": [
            mutant.record() | {"reached": outcomes[mutant.key] == "survived"}
            for mutant in tried
            if outcomes[mutant.key] in alive
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES), metavar="MODULE")
    parser.add_argument("--count", type=int, default=120, help="mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", type=Path, help="try only the survivors of this result")
    parser.add_argument("--output", type=Path, help="JSON; by default that of --again")
    options = parser.parse_args(arguments)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

    earlier = json.loads(options.again.read_text()) if options.again else None
    output = options.output or options.again
    results = {} if earlier is None else earlier["modules"]
    for name in options.modules:
        if earlier is not None and name not in results:
            continue
        started = time.monotonic()
        source, files = ROOT / name, MODULES[name]
        whole = baseline(source, files)
        import_what_tests_need(whole.imported)
        tree = ast.parse(source.read_text())
        every = mutants(tree)
        if earlier is None:
            drawn = sorted(random.Random(options.seed).sample(range(len(every)), min(options.count, len(every))))
            found = try_mutants(source, tree, [every[place] for place in drawn], whole, options.jobs)
            found = {"tests": list(files), "possible": len(every)} | found
        else:
            keys = {tuple(entry[key] for key in KEY) for entry in results[name]["survivors"]}
            again = try_mutants(source, tree, [m for m in every if m.key in keys], whole, options.jobs)
            if again["tried"] != len(keys):
                sys.exit(f"{name}: {len(keys) - again['tried']} of its survivors are no longer in the source: run anew")
            found = results[name] | {"tests": list(files)} | {k: again[k] for k in ("survived", "survivors")}
            found["timed_out"] += again["timed_out"]
            found["killed"] += again["killed"]
        results[name] = found
        print(
            f"{name}: {found['survived']} of {found['tried']} survive, {time.monotonic() - started:.0f} s", flush=True
        )
        if output is not None:
            write(output, results, options.seed if earlier is None else earlier["seed"])


KEY = ("function", "kind", "before", "after", "nth")


def write(output: Path, results: dict[str, Any], seed: int) -> None:
    total = {key: sum(found[key] for found in results.values()) for key in ("tried", "killed", "timed_out", "survived")}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"seed": seed, "total": total, "modules": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
