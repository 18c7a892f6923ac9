"""Mutation testing: puts small faults into the sources, one at a time, and sees whether their tests notice.

No file is changed. A process collects the tests of a group of sources; every mutant is a fork of it, in which the code
of one function is replaced. Where the fault runs when a module is imported, a fork of a process without the package
imports the changed module instead. A first run of the tests records which of them reach which line, and how long they
take. A mutant meets the tests that reach it, the quickest first, up to the first failure; one in a line that no test
reaches has survived. With --again, the survivors of a result are tried once more; "gone" are those whose code no
longer exists.

    python tests/torture/mutate.py --output bench/results/torture/mutate.json
    python tests/torture/mutate.py --again bench/results/torture/mutate.json
    python tests/torture/mutate.py --sources kernels/layout.py --tests kernels/test_layout.py
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
import inspect
import json
import os
import random
import resource
import shutil
import signal
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
from mutants import Mutant, mutants  # noqa: E402
from results import commit  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ADDRESS_SPACE = 12 << 30  # bytes that a mutant may have
TIMED_OUT, NOT_REACHED, OTHER_CLOSURE = "timed out", "not reached", "has other free variables"
IMPORTED = "imported"  # stands for a test in what ran while the tests were collected
LOG = os.fdopen(os.dup(2), "w")


@dataclass(frozen=True)
class Group:
    """Sources whose faults are drawn together, and below ``tests`` the files that concern them, the quickest first."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "layout": Group(
        ("kernels/layout.py",), ("kernels/test_layout.py", "kernels/test_reference.py", "layers/test_linear.py")
    ),
    "reference": Group(("kernels/reference.py",), ("kernels/test_reference.py", "kernels/test_layout.py")),
    "dynamic8": Group(("mebp_triton/store/dynamic8.py",), ("store/test_dynamic8.py", "store/test_optimizer_state.py")),
    "moments": Group(
        ("mebp_triton/store/optimizer_state.py",),
        ("store/test_optimizer_state.py", "store/test_dynamic8.py", "training/optimizers/test_adamw.py"),
    ),
    "selection": Group(("mebp_triton/blocks/selection.py",), ("blocks/test_selection.py", "blocks/test_hooks.py")),
    "optimizers": Group(
        ("mebp_triton/training/optimizers/adamw.py", "mebp_triton/training/optimizers/schedules.py"),
        ("training/optimizers/test_schedules.py", "training/optimizers/test_adamw.py", "store/test_optimizer_state.py"),
    ),
    "lora": Group(
        (
            "mebp_triton/layers/lora_config.py",
            "mebp_triton/layers/lora_function.py",
            "mebp_triton/layers/int4_module.py",
            "mebp_triton/layers/linear.py",
            "mebp_triton/layers/stacked_adapters.py",
            "kernels/token_products.py",
        ),
        (
            "layers/test_lora_config.py",
            "layers/test_lora_function.py",
            "layers/test_int4_module.py",
            "layers/test_linear.py",
            "layers/test_shared_input.py",
            "layers/test_stacked_adapters.py",
            "kernels/test_token_products.py",
            "layers/test_loss.py",
            "blocks/test_recompute.py",
        ),
    ),
    "backward": Group(
        ("mebp_triton/blocks/engine.py", "mebp_triton/blocks/backward.py"),
        (
            "blocks/test_backward.py",
            "blocks/test_call.py",
            "blocks/test_replay.py",
            "blocks/test_leaks.py",
            "blocks/test_engine.py",
            "blocks/test_recompute.py",
            "blocks/test_runner.py",
            "training/test_nonfinite.py",
        ),
    ),
    "loss": Group(
        ("mebp_triton/layers/loss.py", "mebp_triton/layers/head.py", "mebp_triton/layers/deferred_logits.py"),
        (
            "layers/test_head.py",
            "layers/test_deferred_logits.py",
            "layers/test_loss.py",
            "blocks/test_engine.py",
            "store/test_table_rows.py",
        ),
    ),
    "cross_entropy": Group(("kernels/cross_entropy.py",), ("kernels/test_cross_entropy.py", "layers/test_loss.py")),
}
MEASURED = [name for name in GROUPS if name != "cross_entropy"]  # its tests interpret kernels, which takes hours


Place = tuple[str, int]  # file and line


@dataclass(frozen=True)
class Fault:
    """A mutant, and the source that it is in."""

    source: Path
    tree: ast.Module
    mutant: Mutant

    @property
    def key(self) -> tuple[Any, ...]:
        return self.source.relative_to(ROOT).as_posix(), *self.mutant.key

    def places(self) -> list[Place]:
        return [(str(self.source), line) for line in self.mutant.lines]

    def record(self) -> dict[str, Any]:
        return {"file": self.key[0], **self.mutant.record()}


def faults_of(group: Group) -> list[Fault]:
    """All faults that can be put into the sources of a group, in their order."""
    trees = [(ROOT / name, ast.parse((ROOT / name).read_text())) for name in group.sources]
    return [Fault(source, tree, mutant) for source, tree in trees for mutant in mutants(tree)]


@dataclass
class Baseline:
    """The tests of a group, as they run while its sources are whole.

    Attributes:
        seconds: of every test, the quickest first within each file.
        reached: for each line, the tests that ran it; "" for one that ran outside of any test.
    """

    seconds: dict[str, float]
    reached: dict[Place, list[str]] = field(default_factory=dict)

    def tests(self, fault: Fault) -> list[str]:
        """The tests that reach a fault; all, where it runs outside of tests."""
        found = {test for place in fault.places() for test in self.reached.get(place, ())}
        if "" in found:
            return list(self.seconds)
        files = {test.partition("::")[0] for test in found if "::" not in test}  # reached by a fixture
        return [test for test in self.seconds if test in found or test.partition("::")[0] in files]

    def limit(self, tests: Iterable[str]) -> float:
        """Seconds after which a mutant that meets these tests is killed."""
        return 60 + 8 * sum(self.seconds[test] for test in tests)


class Recorder:
    """A pytest plugin that records each test's time, the lines of ``sources`` that it runs, and the first failure.

    Attributes:
        current: the test that runs; the file of tests while a fixture for several runs; "" between tests.
        failed: the first test that failed.
    """

    def __init__(self, sources: Iterable[Path] = ()) -> None:
        self.sources, self.current, self.failed = {str(source) for source in sources}, IMPORTED, ""
        self.seconds: dict[str, float] = {}
        self.reached: dict[Place, set[str]] = {}

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        """Records the lines of functions in ``sources``, as the function of ``sys.settrace``."""
        if frame.f_code.co_filename not in self.sources or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return None
        self.reached.setdefault((frame.f_code.co_filename, frame.f_lineno), set()).add(self.current)
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

    def __init__(self, sources: Iterable[Path], work: Callable[[Collected], Any]) -> None:
        super().__init__(sources)
        self.work, self.found = work, None

    def pytest_runtestloop(self, session: Any) -> bool:
        sys.settrace(None)
        self.items = {item.nodeid: item for item in session.items}
        if session.testsfailed == 0:
            self.found = self.work(self)
        return True

    def run(self, tests: Iterable[str], stop: bool = True) -> str:
        """Runs the tests; returns the first that fails, or ""."""
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed and stop:
                break
        return self.failed


Job = tuple[Fault, Callable[[], str], float]  # what is tried, how, and for how many seconds at most


class MutatedSource(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree instead of its file."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        path = fault.source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        self.name = path if path.startswith("mebp_triton.") else f"mebp_triton.{path}"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.fault.source, loader=self)

    def exec_module(self, module: Any) -> None:
        exec(compile(self.fault.tree, str(self.fault.source), "exec"), module.__dict__)


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
        """Returns None while it works; then what it found, "timed out", or how it died."""
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
    """Starts ``work`` in a fork; its output is thrown away."""
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


def changed_code(fault: Fault) -> types.CodeType:
    """The code of the outermost function that holds the fault, compiled with the fault in it."""
    assert fault.mutant.outermost is not None
    names, line = fault.mutant.outermost
    fault.mutant.put_in()
    code = compile(fault.tree, str(fault.source), "exec")
    for name in names:
        nested = [item for item in code.co_consts if isinstance(item, types.CodeType) and item.co_name == name]
        code = next(item for item in nested if item.co_firstlineno == line or name != names[-1])
    return code


Functions = dict[tuple[str, str, int], list[types.FunctionType]]


def functions_of(sources: set[str]) -> Functions:
    """All functions that come from these files, by file, name and first line."""
    found: Functions = {}
    for item in gc.get_objects():
        if isinstance(item, types.FunctionType) and item.__code__.co_filename in sources:
            found.setdefault(_identity(item.__code__), []).append(item)
    return found


def _identity(code: types.CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


def put_in_place(code: types.CodeType, functions: Functions) -> None:
    """Gives ``code`` to its functions, and the code nested in it to those nested functions that exist already."""
    for function in functions.get(_identity(code), ()):
        function.__code__ = code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            put_in_place(inner, functions)


def in_forks(jobs: Iterable[Job], count: int) -> dict[Any, str]:
    """Runs the jobs, ``count`` at a time. Returns by fault the test that noticed it, or ""."""
    waiting, running, outcomes = list(reversed(list(jobs))), [], {}
    while waiting or running:
        while waiting and len(running) < count:
            fault, work, seconds = waiting.pop()
            running.append((fault, start(work, seconds)))
        for entry in list(running):
            fault, child = entry
            if (found := child.ended()) is None:
                continue
            running.remove(entry)
            outcomes[fault.key] = found
            mutant = fault.mutant
            change = f"{mutant.before[:60]} -> {mutant.after[:60]}"
            print(f"{found or 'SURVIVED':60.60} {fault.source.name}:{mutant.line} {change}", file=LOG, flush=True)
        time.sleep(0.01)
    return outcomes


def in_collected(collected: Collected, tried: list[Fault], jobs: int) -> dict[str, Any]:
    """Runs the collected tests once, and then against every fault in the body of a function.

    Not among them are functions that ran when the tests were imported: a fault put in afterwards would not show.
    Returns the seconds of every test, the modules that the tests import, and the outcomes.
    """

    def record() -> Any:
        sys.settrace(collected.trace)
        failed = collected.run(list(collected.items), stop=False)
        sys.settrace(None)
        reached = [[*place, sorted(tests)] for place, tests in collected.reached.items()]
        return [failed, collected.seconds, reached, sorted(sys.modules)]

    found = wait(start(record, 3600))
    if not isinstance(found, list) or found[0]:
        sys.exit(f"{found[0] if isinstance(found, list) else found} does not pass as it is")
    _, seconds, reached, imported = found
    files = list(dict.fromkeys(test.partition("::")[0] for test in collected.items))
    order = sorted(seconds, key=lambda test: (files.index(test.partition("::")[0]), seconds[test]))
    whole = Baseline({test: seconds[test] for test in order}, {(file, line): tests for file, line, tests in reached})
    at_import = {place for place, tests in whole.reached.items() if IMPORTED in tests}
    functions = functions_of(collected.sources)
    gc.freeze()  # what exists by now is shared with the forks

    def attempt(fault: Fault, tests: list[str]) -> str:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        code = changed_code(fault)
        try:
            put_in_place(code, functions)
        except ValueError:
            return OTHER_CLOSURE
        return collected.run(tests)

    late = [one for one in tried if one.mutant.outermost is not None and not at_import & set(one.places())]
    within = [(fault, whole.tests(fault)) for fault in late]
    outcomes = {fault.key: NOT_REACHED for fault, tests in within if not tests}
    work = [(one, functools.partial(attempt, one, tests), whole.limit(tests)) for one, tests in within if tests]
    outcomes |= in_forks(work, jobs)
    return {"seconds": seconds, "imported": imported, "outcomes": [[list(key), end] for key, end in outcomes.items()]}


def import_what_tests_need(names: list[str]) -> None:
    """Imports, of the modules that the tests import, those of other packages."""
    own = ("mebp_triton", "tests", "conftest", "mutants", "__main__", "support")
    for name in names:
        if name.partition(".")[0] in own or name in sys.modules:
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert not any(name.startswith("mebp_triton") for name in sys.modules)
    gc.freeze()


def attempt_imported(fault: Fault, files: tuple[str, ...]) -> str:
    """Imports the source with the fault in it and runs all tests. Returns the test that notices it, or ""."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    fault.mutant.put_in()
    sys.meta_path.insert(0, MutatedSource(fault))
    recorder = Recorder()
    code = run_pytest(files, recorder, "-x")
    return "" if code == 0 else recorder.failed or f"pytest ended with {code}"


def try_faults(group: Group, tried: list[Fault], jobs: int) -> Any:
    """Tries faults of a group; counts the outcomes, and lists the survivors."""

    def collect() -> Any:
        sources = [ROOT / name for name in group.sources]
        plugin = Collected(sources, lambda collected: in_collected(collected, tried, jobs))
        sys.settrace(plugin.trace)  # until the tests are collected
        run_pytest(group.tests, plugin)
        return plugin.found

    found = wait(start(collect, 4 * 3600))
    if not isinstance(found, dict):
        sys.exit(f"{group.sources[0]}: no result from its tests: {found}")
    whole = Baseline(found["seconds"])
    import_what_tests_need(found["imported"])
    outcomes = {tuple(key): outcome for key, outcome in found["outcomes"] if outcome != OTHER_CLOSURE}
    rest = [fault for fault in tried if fault.key not in outcomes]
    work = [(one, functools.partial(attempt_imported, one, group.tests), whole.limit(whole.seconds)) for one in rest]
    outcomes |= in_forks(work, jobs)
    alive = ("", NOT_REACHED)
    return {
        "tried": len(tried),
        "killed": sum(outcome not in (*alive, TIMED_OUT) for outcome in outcomes.values()),
        "timed_out": sum(outcome == TIMED_OUT for outcome in outcomes.values()),
        "survived": sum(outcome in alive for outcome in outcomes.values()),
        "survivors": [
            fault.record() | {"reached": outcomes[fault.key] == ""} for fault in tried if outcomes[fault.key] in alive
        ],
    }


KEY = ("file", "function", "kind", "before", "after", "nth")


def try_sample(group: Group, count: int, seed: int, jobs: int) -> dict[str, Any]:
    """Tries ``count`` faults of a group, drawn at random."""
    every = faults_of(group)
    drawn = sorted(random.Random(seed).sample(range(len(every)), min(count, len(every))))
    found = try_faults(group, [every[place] for place in drawn], jobs)
    return {"sources": list(group.sources), "tests": list(group.tests), "possible": len(every)} | found


def try_survivors(group: Group, earlier: dict[str, Any], jobs: int) -> dict[str, Any]:
    """Tries the survivors of an earlier result once more."""
    keys = {tuple(entry[key] for key in KEY) for entry in earlier["survivors"]}
    again = try_faults(group, [fault for fault in faults_of(group) if fault.key in keys], jobs)
    found = earlier | {"tests": list(group.tests), **{key: again[key] for key in ("survived", "survivors")}}
    found["killed"] += again["killed"]
    found["timed_out"] += again["timed_out"]
    found["gone"] = found.get("gone", 0) + len(keys) - again["tried"]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=MEASURED, metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--sources", nargs="+", metavar="FILE", help="a group of its own; needs --tests")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="below tests/, for --sources")
    parser.add_argument("--count", type=int, default=110, help="mutants of each group, drawn at random (default: 110)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", type=Path, help="tries only the survivors of this result")
    parser.add_argument("--output", type=Path, help="JSON; by default that of --again")
    options = parser.parse_args(arguments)
    if bool(options.sources) != bool(options.tests):
        parser.error("--sources needs --tests, and --tests needs --sources")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

    groups = {name: GROUPS[name] for name in options.groups}
    if options.sources:
        groups = {"own": Group(tuple(options.sources), tuple(options.tests))}
    earlier = json.loads(options.again.read_text()) if options.again else None
    output = options.output or options.again
    results = {} if earlier is None else earlier["groups"]
    for name, group in groups.items():
        if earlier is not None and name not in results:
            continue
        started = time.monotonic()
        if earlier is None:
            results[name] = try_sample(group, options.count, options.seed, options.jobs)
        else:
            results[name] = try_survivors(group, results[name], options.jobs)
        found, seconds = results[name], time.monotonic() - started
        print(f"{name}: {found['survived']} of {found['tried']} survive, {seconds:.0f} s", flush=True)
        if output is not None:
            write(output, results, options.seed if earlier is None else earlier["seed"])


def write(output: Path, results: dict[str, Any], seed: int) -> None:
    counts = ("tried", "killed", "timed_out", "gone", "survived")
    total = {key: sum(found.get(key, 0) for found in results.values()) for key in counts}
    value = {"seed": seed, "commit": commit(), "total": total, "groups": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
