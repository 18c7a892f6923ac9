"""Checks and measures everything that needs a GPU, in less than ten minutes; ``--dry-run`` rehearses it on a CPU.

    python bench/gpu_suite.py --output bench/results/NAME.json [--dry-run] [--parts a,b] [--minutes 9]

Each part runs in a process of its own with a time limit of its own, so that one that fails, hangs or loses the device
does not stop the others. The JSON is written after every part. The exit code is 1 if any part failed,
and 2 if nothing was begun.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import git, unwritable

# The parts in their order, and their shares of the time. The time that a part does not use goes to those after it.
PARTS = {
    "environment": 15,
    "compile": 60,
    "correctness": 90,
    "paged": 40,
    "graphs": 35,
    "profile": 40,
    "training": 110,
    "speed": 90,
    "tune": 45,
    "memory": 10,
}
GRACE = 0.85  # of a part's time, after which it stops by itself


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--commit", help="the commit that is measured, where git does not know it")
    chosen = parser.parse_args()
    chosen.parts = [name for name in PARTS if name in chosen.parts.split(",")]
    unknown = sorted(set(parser.parse_args().parts.split(",")) - PARTS.keys())
    if unknown:
        parser.error(f"--parts must be some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not chosen.minutes > 0:
        parser.error(f"--minutes must be positive, got {chosen.minutes}")
    if (problem := unwritable(chosen.output)) is not None:
        parser.error(f"--output cannot be written: {problem}")
    return chosen


def main() -> int:
    chosen = arguments()
    ends = time.monotonic() + 60 * chosen.minutes
    with tempfile.TemporaryDirectory() as scratch:
        # Here lies the table that this run tunes; the user's own must not be used.
        os.environ["XDG_CACHE_HOME"] = scratch
        # By default torch asks CUDA whether there is a device, and forked children could not use CUDA afterwards.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if chosen.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"
        return run(chosen, ends, Path(scratch))


def run(chosen: argparse.Namespace, ends: float, scratch: Path) -> int:
    import torch

    from mebp_triton.system import strict_json

    if not chosen.dry_run and not torch.backends.cuda.is_built():
        print("gpu_suite.py: error: this torch has no CUDA; --dry-run rehearses on a CPU", file=sys.stderr)
        return 2
    part(chosen.parts[0])  # imported once, for all children
    record: dict[str, Any] = {
        "format": 1,
        "dry_run": chosen.dry_run,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **measured_commit(chosen.commit),
        "minutes": chosen.minutes,
        "parts": {},
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen.parts:
        waiting = chosen.parts[chosen.parts.index(name) :]
        seconds = (ends - time.monotonic()) * PARTS[name] / sum(PARTS[part] for part in waiting)
        found = run_part(name, chosen, seconds, scratch / f"{name}.json")
        record["parts"][name] = found
        strict_json.write_json(chosen.output, record)
        print(f"{name}: {found['status']} in {found['seconds']:.0f} s", found["error"] or "", flush=True)
    return int(any(part["status"] != "done" for part in record["parts"].values()))


def measured_commit(given: str | None) -> dict[str, Any]:
    """The commit that is measured, and whether files differ from it."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": given or git("rev-parse", "HEAD"), "changed_files": None if changes is None else bool(changes)}


def run_part(name: str, chosen: argparse.Namespace, seconds: float, kept: Path) -> dict[str, Any]:
    """Runs one part in a child process, which inherits the imports; the child is killed when its time is over."""
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(
        target=child_main, args=(name, chosen, started + GRACE * seconds, kept)
    )
    child.start()
    child.join(max(seconds, 1.0))
    killed = child.is_alive()
    if killed:
        child.kill()
        child.join()
    found: dict[str, Any] = {"results": {}, "failures": [], "error": None}
    if kept.exists():
        found = json.loads(kept.read_text())
    if killed:
        found["error"] = f"killed after {seconds:.0f} s"
    elif child.exitcode and found["error"] is None:
        found["error"] = f"the process ended with exit code {child.exitcode}"
    elif found["failures"] and found["error"] is None:
        found["error"] = f"{len(found['failures'])} checks failed; the first: {found['failures'][0]}"
    return {
        "status": "failed" if found["error"] else "done",
        "error": found["error"],
        "seconds": round(time.monotonic() - started, 2),
        "limit_seconds": round(seconds, 1),
        "failures": found["failures"],
        "results": found["results"],
    }


def child_main(name: str, chosen: argparse.Namespace, deadline: float, kept: Path) -> None:
    import torch
    from gpu.session import Session
    from gpu.sizes import REAL, REHEARSAL

    device = torch.device("cpu" if chosen.dry_run else "cuda:0")
    session = Session(device, REHEARSAL if chosen.dry_run else REAL, deadline, chosen.output, kept)
    error = None
    try:
        torch.manual_seed(0)
        part(name)(session)
        session.synchronize()
    except Exception as problem:  # a part may fail in any way; that is recorded, and the others run
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"[:2000]
    session.save(now=True, error=error)


def part(name: str) -> Any:
    from gpu.compilation import compilation
    from gpu.correctness import correctness
    from gpu.environment import environment
    from gpu.graphs import graphs
    from gpu.memory import memory
    from gpu.paged import paged
    from gpu.profiles import profiles
    from gpu.speed import speed
    from gpu.training import training
    from gpu.tuning import tuning

    found = (environment, compilation, correctness, paged, graphs, profiles, training, speed, tuning, memory)
    return dict(zip(PARTS, found, strict=True))[name]


if __name__ == "__main__":
    sys.exit(main())
