"""Mutation testing: puts small faults into a module, one at a time, and sees whether its tests notice.

No file is changed. A process collects the tests of a module; every mutant is a fork of it, in which the code of one
function is replaced. Where the fault runs when the module is imported, a fork of a process without the package imports
the changed module instead. A first run of the tests writes down which of them reach which line, and how long they
take: a mutant meets those that reach it, the quickest first, up to the first failure. One in a line that no test
reaches has survived. With --again, the survivors of a result are tried once more; "gone" are those whose code no
longer exists.

    python tests/torture/mutate.py --count 120 --output bench/results/torture/mutate.json
    python tests/torture/mutate.py --again bench/results/torture/mutate.json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
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
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import Mutant, mutants  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ADDRESS_SPACE = 12 << 30  # bytes, of a mutant
TIMED_OUT, NOT_REACHED, OTHER_CLOSURE = "timed out", "not reached", "has other free variables"
LOG = os.fdopen(os.dup(2), "w")
# The module, and the tests that concern it, the quickest first.
MODULES: dict[str, tuple[str, ...]] = {
    "kernels/layout.py": ("kernels/test_layout.py", "kernels/test_reference.py", "layers/test_linear.py"),
    "kernels/reference.py": ("kernels/test_reference.py", "kernels/test_layout.py"),
    "kernels/cross_entropy.py": ("kernels/test_cross_entropy.py", "layers/test_loss.py"),
    "mebp_triton/layers/lora_config.py": ("layers/test_lora_config.py",),
    "mebp_triton/layers/lora_function.py": (
        "layers/test_lora_function.py",
        "layers/test_linear.py",
        "layers/test_shared_input.py",
    ),
    "mebp_triton/layers/int4_module.py": ("layers/test_int4_module.py", "layers/test_linear.py"),
    "mebp_triton/layers/linear.py": ("layers/test_linear.py", "layers/test_shared_input.py", "blocks/test_replay.py"),
    "mebp_triton/layers/deferred_logits.py": ("layers/test_deferred_logits.py", "layers/test_loss.py"),
    "mebp_triton/layers/head.py": ("layers/test_head.py", "layers/test_loss.py"),
    "mebp_triton/layers/loss.py": ("layers/test_loss.py",),
    "mebp_triton/blocks/backward.py": (
        "blocks/test_backward.py",
        "blocks/test_call.py",
        "blocks/test_leaks.py",
        "blocks/test_recompute.py",
    ),
    "mebp_triton/blocks/engine.py": ("blocks/test_engine.py", "blocks/test_backward.py", "blocks/test_call.py"),
    "mebp_triton/blocks/selection.py": ("blocks/test_selection.py", "blocks/test_hooks.py"),
    "mebp_triton/store/dynamic8.py": ("store/test_dynamic8.py", "store/test_optimizer_state.py"),
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
    """A pytest plugin: the time of every test, the lines of ``source`` that it runs, and the first that failed."""

    def __init__(self, source: Path) -> None:
        self.source, self.current, self.failed = str(source), "", ""
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

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


class Collected(Recorder):
    """A pytest plugin that, instead of running the tests, runs ``work`` with itself, which may fork and run them."""

    def __init__(self, source: Path, work: Callable[[Collected], Any]) -> None:
        super().__init__(source)
        self.work, self.found = work, None

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        if session.testsfailed == 0:
            self.found = self.work(self)
        return True

    def run(self, tests: Iterable[str], stop: bool = True) -> str:
        """The first of the tests that fails, or ""."""
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed and stop:
                break
        return self.failed


Job = tuple[Mutant, Callable[[], str], float]


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


def run_pytest(files: Iterable[str], plugin: Any, *options: str) -> int:
    fixed = ["-q", "--no-header", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    fixed += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return int(pytest.main([*fixed, *options, *(str(ROOT / "tests" / name) for name in files)], plugins=[plugin]))


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
        result, output = self.folder / "result.json", self.folder / "output.txt"
        found = json.loads(result.read_text()) if result.exists() else None
        if found is None:
            found = f"ended with status {status}: {output.read_text(errors='replace')[-1500:]}"
        shutil.rmtree(self.folder, ignore_errors=True)
        return found if done else TIMED_OUT


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
    except BaseException:
        Path("output.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def wait(child: Child) -> Any:
    while (found := child.ended()) is None:
        time.sleep(0.02)
    return found


def changed_code(source: Path, tree: ast.Module, mutant: Mutant) -> types.CodeType:
    """Of the outermost function, with the mutant in it."""
    assert mutant.outermost is not None
    names, line = mutant.outermost
    mutant.put_in()
    code = compile(tree, str(source), "exec")
    for name in names:
        nested = [item for item in code.co_consts if isinstance(item, types.CodeType) and item.co_name == name]
        code = next(item for item in nested if item.co_firstlineno == line or name != names[-1])
    return code


def functions_of(source: Path) -> dict[tuple[str, int], list[types.FunctionType]]:
    """All functions that come from a file, by name and first line."""
    found: dict[tuple[str, int], list[types.FunctionType]] = {}
    for item in gc.get_objects():
        if isinstance(item, types.FunctionType) and item.__code__.co_filename == str(source):
            found.setdefault((item.__code__.co_name, item.__code__.co_firstlineno), []).append(item)
    return found


def put_in_place(code: types.CodeType, functions: dict[tuple[str, int], list[types.FunctionType]]) -> None:
    """Into the functions that it belongs to; also those within it, some of which may be made already."""
    for function in functions.get((code.co_name, code.co_firstlineno), ()):
        function.__code__ = code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            put_in_place(inner, functions)


def in_forks(jobs: Iterable[Job], count: int, source: Path) -> dict[Any, str]:
    """What became of each mutant, ``count`` at a time."""
    waiting, running, outcomes = list(reversed(list(jobs))), [], {}
    while waiting or running:
        while waiting and len(running) < count:
            mutant, work, seconds = waiting.pop()
            running.append((mutant, start(work, seconds)))
        for entry in list(running):
            mutant, child = entry
            if (found := child.ended()) is None:
                continue
            running.remove(entry)
            outcomes[mutant.key] = found
            change = f"{mutant.before[:60]} -> {mutant.after[:60]}"
            print(f"{found or 'SURVIVED':60.60} {source.name}:{mutant.line} {change}", file=LOG, flush=True)
        time.sleep(0.01)
    return outcomes


def allowed(tests: list[str], whole: Baseline) -> float:
    return 60 + 8 * sum(whole.seconds[test] for test in tests)


def in_collected(collected: Collected, tree: ast.Module, tried: list[Mutant], jobs: int) -> dict[str, Any]:
    """The baseline, and the outcomes of the mutants in functions' bodies, in the process that collected the tests."""

    def record() -> Any:
        sys.settrace(collected.trace)
        failed = collected.run(list(collected.items), stop=False)
        sys.settrace(None)
        reached = {line: sorted(tests) for line, tests in collected.reached.items()}
        return [failed, collected.seconds, reached, sorted(sys.modules)]

    failed, seconds, reached, imported = wait(start(record, 1200))
    if failed:
        sys.exit(f"{failed} does not pass as it is")
    files = list(dict.fromkeys(test.partition("::")[0] for test in collected.items))
    order = sorted(seconds, key=lambda test: (files.index(test.partition("::")[0]), seconds[test]))
    whole = Baseline({test: seconds[test] for test in order}, {int(k): v for k, v in reached.items()}, imported)
    functions = functions_of(Path(collected.source))
    gc.freeze()  # what is there by now is shared with the forks

    def attempt(mutant: Mutant, tests: list[str]) -> str:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        code = changed_code(Path(collected.source), tree, mutant)
        try:
            put_in_place(code, functions)
        except ValueError:
            return OTHER_CLOSURE
        return collected.run(tests)

    within = [(mutant, whole.tests(mutant)) for mutant in tried if mutant.outermost is not None]
    outcomes = {mutant.key: NOT_REACHED for mutant, tests in within if not tests}
    work = [(m, functools.partial(attempt, m, tests), allowed(tests, whole)) for m, tests in within if tests]
    outcomes |= in_forks(work, jobs, Path(collected.source))
    return {"baseline": [whole.seconds, imported], "outcomes": [[list(key), found] for key, found in outcomes.items()]}


def import_what_tests_need(names: list[str]) -> None:
    """Of a baseline's modules, those of other packages."""
    own = ("mebp_triton", "tests", "conftest", "mutants", "__main__", "support")
    for name in names:
        if name.partition(".")[0] in own or name in sys.modules:
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert not any(name.startswith("mebp_triton") for name in sys.modules)
    gc.freeze()


def attempt_imported(source: Path, tree: ast.Module, mutant: Mutant, files: tuple[str, ...]) -> str:
    """The test that notices it, or ""."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    mutant.put_in()
    sys.meta_path.insert(0, MutatedSource(source, tree))
    recorder = Recorder(source)
    code = run_pytest(files, recorder, "-x")
    return "" if code == 0 else recorder.failed or f"pytest ended with {code}"


def try_mutants(source: Path, files: tuple[str, ...], tree: ast.Module, tried: list[Mutant], jobs: int) -> Any:
    """The outcome of each, and what is counted."""

    def collect() -> Any:
        plugin = Collected(source, lambda collected: in_collected(collected, tree, tried, jobs))
        run_pytest(files, plugin)
        return plugin.found

    found = wait(start(collect, 4 * 3600))
    if not isinstance(found, dict):
        sys.exit(f"{source.name}: no result from its tests: {found}")
    whole = Baseline(found["baseline"][0])
    import_what_tests_need(found["baseline"][1])
    outcomes = {tuple(key): outcome for key, outcome in found["outcomes"] if outcome != OTHER_CLOSURE}
    rest = [mutant for mutant in tried if mutant.key not in outcomes]
    seconds = allowed(list(whole.seconds), whole)
    work = [(m, functools.partial(attempt_imported, source, tree, m, files), seconds) for m in rest]
    outcomes |= in_forks(work, jobs, source)
    alive = ("", NOT_REACHED)
    return {
        "tried": len(tried),
        "killed": sum(outcome not in (*alive, TIMED_OUT) for outcome in outcomes.values()),
        "timed_out": sum(outcome == TIMED_OUT for outcome in outcomes.values()),
        "survived": sum(outcome in alive for outcome in outcomes.values()),
        "survivors": [
            mutant.record() | {"reached": outcomes[mutant.key] == ""}
            for mutant in tried
            if outcomes[mutant.key] in alive
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES), metavar="MODULE")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="in place of those that concern a module")
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
        source, files = ROOT / name, tuple(options.tests or MODULES[name])
        tree = ast.parse(source.read_text())
        every = mutants(tree)
        if earlier is None:
            drawn = sorted(random.Random(options.seed).sample(range(len(every)), min(options.count, len(every))))
            found = try_mutants(source, files, tree, [every[place] for place in drawn], options.jobs)
            found = {"tests": list(files), "possible": len(every)} | found
        else:
            keys = {tuple(entry[key] for key in KEY) for entry in results[name]["survivors"]}
            again = try_mutants(source, files, tree, [m for m in every if m.key in keys], options.jobs)
            found = results[name] | {"tests": list(files), **{key: again[key] for key in ("survived", "survivors")}}
            found["killed"] += again["killed"]
            found["timed_out"] += again["timed_out"]
            found["gone"] = found.get("gone", 0) + len(keys) - again["tried"]
        results[name] = found
        print(
            f"{name}: {found['survived']} of {found['tried']} survive, {time.monotonic() - started:.0f} s", flush=True
        )
        if output is not None:
            write(output, results, options.seed if earlier is None else earlier["seed"])


KEY = ("function", "kind", "before", "after", "nth")


def write(output: Path, results: dict[str, Any], seed: int) -> None:
    counts = ("tried", "killed", "timed_out", "gone", "survived")
    total = {key: sum(found.get(key, 0) for found in results.values()) for key in counts}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    value = {"seed": seed, "commit": commit.stdout.strip(), "total": total, "modules": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
