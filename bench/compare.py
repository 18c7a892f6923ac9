"""Compares `mebp train`, with everything in files, to transformers + PEFT (+ bitsandbytes) side by side in one run.

    python bench/compare.py --train-file valid.txt --output bench/results/NAME.json

SmolLM2-135M, r = 16 on every linear layer, gradient checkpointing. The peers get the weights that our store decodes to.
All sides must start from the same loss on the same held-out windows: NF4, which quantizes again, within 10 %; NF4 with
its layers replaced by ours within 0.1 % of NF4. Every run is a process of its own; the sides take turns, and all raw
step times are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import commit, processor
from smollm2 import write_decoded_model, write_store

from mebp_triton.cli.peft_baseline import BASES, REPLACED
from mebp_triton.system.machine import environment
from mebp_triton.system.units import MIB

SETTINGS: dict[str, Any] = {
    "max_length": 256,
    "learning_rate": 5e-4,
    "warmup_steps": 0,
    "lora_r": 16,
    "lora_alpha": 16,
    "seed": 0,
    "max_eval_windows": 4,
}


def run(command: list[str]) -> dict[str, Any]:
    """Runs Python with these arguments; returns the JSON that it prints."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run_ours(store: Path, files: tuple[Path, Path], steps: int, directory: Path) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    residency = ["--weights=file", "--checkpoints=file", "--optimizer-state=file"]
    data = ["--train-file", str(files[0]), "--validation-file", str(files[1]), "--output-dir", str(directory)]
    summary = run(
        ["-m", "mebp_triton.cli", "train", str(store), *data, *flags, *residency, f"--max-steps={steps}", "--json"]
    )
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return summary | {
        "step_seconds": [row["seconds"] for row in metrics],
        "train_losses": [row["loss"] for row in metrics],
        "tokens_per_step": metrics[0]["tokens"],
    }


def run_peer(model: Path, base: str, files: tuple[Path, Path], steps: int) -> dict[str, Any]:
    settings = SETTINGS | {
        "model": str(model),
        "tokenizer": str(model),
        "base": base,
        "train_file": str(files[0]),
        "validation_file": str(files[1]),
        "max_steps": steps,
    }
    return run(["-m", "mebp_triton.cli.peft_baseline", json.dumps(settings)])


def check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """SystemExit if the sides do not start from the same loss: then the comparison means nothing."""
    ours = results["mebp"][0]["loss_before"]
    for name, runs in results.items():
        theirs, reference, allowed = runs[0]["loss_before"], ours, 0.1 if name.startswith("nf4") else 1e-3
        base = name.removesuffix(REPLACED)
        if base != name and base in results:  # the replaced layers have the base's codes and scales
            reference, allowed = results[base][0]["loss_before"], 1e-3
        if abs(theirs - reference) > allowed * reference:
            raise SystemExit(f"{name} starts at loss {theirs}, not at {reference}: not the same model")


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    tokens = SETTINGS["max_length"] - 1
    table = {}
    for name, runs in results.items():
        seconds = [value for one in runs for value in one["step_seconds"][1:]]  # without the first, which warms up
        table[name] = {
            "seconds_per_step_median": statistics.median(seconds),
            "tokens_per_second_median": tokens / statistics.median(seconds),
            "peak_rss_mib_max": max(one["peak_rss_bytes"] for one in runs) / MIB,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, help="default: the training file")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--steps", type=int, default=8, help="per run, of which the first is not timed")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument(
        "--bases",
        nargs="*",
        choices=BASES,
        default=["float32", "nf4-float32", f"nf4-float32{REPLACED}"],
        help="the peers' base weights",
    )
    arguments = parser.parse_args()
    files = (arguments.train_file, arguments.validation_file or arguments.train_file)

    results: dict[str, list[dict[str, Any]]] = {"mebp": [], **{base: [] for base in arguments.bases}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        root = Path(scratch)
        store, decoded = root / "store", root / "decoded"
        write_store(store)
        write_decoded_model(store, decoded)
        for turn in range(arguments.rounds):
            results["mebp"].append(run_ours(store, files, arguments.steps, root / f"run-{turn}"))
            for base in arguments.bases:
                results[base].append(run_peer(decoded, base, files, arguments.steps))
            check_same(results)

    record = {
        "summary": summarize(results),
        "settings": SETTINGS | {"steps": arguments.steps, "rounds": arguments.rounds},
        "environment": environment() | {"cpu_count": os.cpu_count(), "processor": processor(), "commit": commit()},
        "raw": results,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["summary"].items():
        print(name, {key: round(value, 2) for key, value in row.items()})


if __name__ == "__main__":
    main()
