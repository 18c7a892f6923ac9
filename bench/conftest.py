"""Import paths of the pytest-benchmark suites, and the part of their JSON that is kept."""

import sys
from pathlib import Path

import torch

from mebp_triton.system.machine import environment

ROOT = Path(__file__).resolve().parent.parent
# As in tests/conftest.py: from the root, ``kernels`` would shadow another package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "bench"))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps every sample, the machine's kind and the versions; drops hosts' names and what follows from the samples."""
    kept = [
        {
            "group": entry["group"],
            "problem": entry["extra_info"]["problem"],
            "side": entry["extra_info"]["side"],
            "median_seconds": entry["stats"]["median"],
            "samples_seconds": [round(value, 9) for value in entry["stats"]["data"]],
        }
        for entry in output_json["benchmarks"]
    ]
    timers = sorted({entry["options"]["timer"] for entry in output_json["benchmarks"]})
    from machine import processor

    on_gpu = torch.cuda.is_available()
    machine = environment(torch.device("cuda") if on_gpu else None) | {"cpu": processor()}
    commit, when = output_json["commit_info"].get("id"), output_json["datetime"]
    changed = output_json["commit_info"].get("dirty")
    output_json.clear()
    output_json.update(
        {
            "machine_info": machine,
            "timers": timers,
            "commit": commit,
            "changed_files": changed,
            "datetime": when,
            "benchmarks": kept,
        }
    )
