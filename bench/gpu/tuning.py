"""Part ``tune``: the autotuner on the shapes of the suite; its table is kept beside the suite's JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

from mebp_triton.autotune.log import Trial, log_path
from mebp_triton.autotune.results import Results
from mebp_triton.autotune.shapes import problems
from mebp_triton.autotune.tune import Machine, Rank, model_rank, tune
from mebp_triton.kernels.configs import Problem, TileConfig, default_config
from mebp_triton.kernels.tables import architecture_of, load_tables, user_table_path
from mebp_triton.system import strict_json

from .session import Session


def tuning(session: Session) -> None:
    """Tunes into the user's table, where ``choose`` finds it in the parts after this one."""
    architecture = architecture_of(session.device) or "cpu"
    results = Results(user_table_path(architecture), architecture, strict_json.write_json)
    machine = Machine(session.device, session.device.type, session.limits(), session.timer())
    if session.on_gpu:
        machine = Machine.of(session.device)
    todo = []
    for m in session.sizes.tune_tokens:
        todo += problems(session.sizes.tune_shapes, [m], dtype=session.dtype)
    compiled = model_rank(architecture) if session.on_gpu else rank_nothing
    # First the few configurations that the shipped tables name; then all that compile well.
    for name, rank in (("shipped", shipped(architecture)), ("compiled", compiled)):
        found = session.results[name] = []
        for problem in session.while_time(name, todo):
            tune([problem], machine, results, rank, force=True)
            found.append(f"{problem.kernel} M={problem.m} {problem.n}x{problem.k}")
            keep(session, results)


def shipped(architecture: str) -> Rank:
    """Ranks every configuration of the tables as a candidate; only measured ones have to be compiled."""
    entries = load_tables(architecture).values()

    def rank(problem: Problem) -> Sequence[Trial]:
        mine = [entry for entry in entries if entry.problem.kernel == problem.kernel]
        routes = dict.fromkeys(entry.route for entry in mine)
        tiles = [route for route in routes if isinstance(route, TileConfig)]
        return [Trial(route, predicted_us=1.0) for route in tiles if route.suits(problem)]

    return rank


def rank_nothing(problem: Problem) -> Sequence[Trial]:
    """Ranks the default alone: a rehearsal compiles nothing, and measures the default and the panel route."""
    return [Trial(default_config(problem), predicted_us=1.0)]


def keep(session: Session, results: Results) -> None:
    """Copies the table and its log beside the suite's JSON."""
    for name, path in (("table", results.path), ("log", log_path(results.path))):
        if path.exists():
            target = session.output.with_name(f"{session.output.stem}-{name}.json")
            shutil.copyfile(path, target)
            session.results[name] = target.name
    session.results["entries"] = len(json.loads(results.path.read_text())["entries"]) if results.path.exists() else 0
