"""Compares `mebp train` to transformers + PEFT, dense and with bitsandbytes, in turns and in one run.

    python bench/compare.py --train-file valid.txt --output bench/results/NAME.json
    python bench/compare.py --train-file valid.txt --output bench/results/NAME.json --beside 2 --steps 3 \\
        --sides mebp nf4-float32

SmolLM2-135M, r = 16 on every linear layer, gradient checkpointing. `mebp` has weights, block inputs and moments in
files, `mebp-resident` in memory. The peers get the weights that our store decodes to. NF4 on the way that bitsandbytes
takes without AVX-512 is a side of its own (bench/bitsandbytes_path.py). All sides must start from the same loss on the
same held-out windows: NF4, which quantizes again, within 10 %; NF4 with its layers replaced by ours, or decoded
another way, within 0.1 % of NF4. Every run is a process of its own; all raw step times are kept. With `--beside N`
every side runs twice in each round, alone and beside N processes that compute without end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes_path
from machine import commit, processor_facts
from turns import beside, in_words, ratios, spread, take_turns

from mebp_triton.cli.peft_baseline import BASES, REPLACED
from mebp_triton.system.machine import environment
from mebp_triton.system.units import MIB

PLACES = {"mebp": "file", "mebp-resident": "device"}  # our sides, and where their weights, block inputs, moments lie
SCALAR = "-scalar"  # ends the name of a base that bitsandbytes decodes without AVX-512
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


def run_ours(store: Path, place: str, files: tuple[Path, Path], steps: int) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    flags += [f"--{what}={place}" for what in ("weights", "checkpoints", "optimizer-state")]
    data = ["--train-file", str(files[0]), "--validation-file", str(files[1])]
    with tempfile.TemporaryDirectory(dir=store.parent) as scratch:
        directory = Path(scratch) / "run"
        output = ["--output-dir", str(directory), f"--max-steps={steps}", "--json"]
        summary = run(["-m", "mebp_triton.cli", "train", str(store), *data, *flags, *output])
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
        "base": base.removesuffix(SCALAR),
        "train_file": str(files[0]),
        "validation_file": str(files[1]),
        "max_steps": steps,
    }
    program = [bitsandbytes_path.__file__] if base.endswith(SCALAR) else ["-m", "mebp_triton.cli.peft_baseline"]
    return run([*program, json.dumps(settings)])


def check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """SystemExit if the sides do not start from the same loss: then the comparison means nothing."""
    losses = {name: runs[0]["loss_before"] for name, runs in results.items()}
    first = next(iter(losses))
    for name, loss in losses.items():
        side = name.split(" ")[0]
        nf4, base = side.startswith("nf4"), side.removesuffix(REPLACED).removesuffix(SCALAR)
        reference, allowed = losses[first], 0.1 if nf4 != first.startswith("nf4") else 1e-3
        if base != side and base in losses:  # the same codes and scales
            reference, allowed = losses[base], 1e-3
        if abs(loss - reference) > allowed * reference:
            raise SystemExit(f"{name} starts at loss {loss}, not at {reference}: not the same model")


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each side its seconds per step, round by round, and its peak; for each but the first, beside the first."""
    tokens = SETTINGS["max_length"] - 1
    table: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        timed = [one["step_seconds"][1:] for one in runs]  # without the first, which warms up
        median = statistics.median(value for one in timed for value in one)
        table[name] = {
            "seconds_per_step": spread(statistics.median(one) for one in timed),
            "seconds_per_step_median": median,
            "tokens_per_second_median": tokens / median,
            "peak_rss_mib_max": max(one["peak_rss_bytes"] for one in runs) / MIB,
        }
    return table


def compare(summary: dict[str, dict[str, Any]], sides: list[str], loops: int) -> dict[str, dict[str, Any]]:
    """Ratios of seconds per step within each round.

    Returns:
        ``speed``: how many times faster the first side is than each other one, under the same load. ``slowdown``: how
        many times longer a step takes beside ``loops`` busy loops than alone.
    """
    seconds = {name: row["seconds_per_step"]["rounds"] for name, row in summary.items()}
    speed = {
        beside(other, load): ratios(seconds[beside(other, load)], seconds[beside(sides[0], load)])
        for load in sorted({0, loops})
        for other in sides[1:]
    }
    slowdown = {name: ratios(seconds[beside(name, loops)], seconds[name]) for name in sides} if loops else {}
    return {"speed": speed, "slowdown": slowdown}


def default_sides() -> list[str]:
    """All sides; NF4 without AVX-512 only where bitsandbytes would use that."""
    scalar = [f"nf4-float32{SCALAR}"] if bitsandbytes_path.path() == "avx512" else []
    return [*PLACES, "float32", "nf4-float32", *scalar, f"nf4-float32{REPLACED}"]


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, help="default: the training file")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--steps", type=at_least(2), default=6, help="per run, of which the first is not timed")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="how often the sides take turns")
    parser.add_argument("--beside", type=at_least(0), default=0, metavar="N", help="busy loops beside a second run")
    choices = [*PLACES, *BASES, *(f"{base}{SCALAR}" for base in BASES if base.startswith("nf4"))]
    parser.add_argument("--sides", nargs="+", choices=choices, help="the first is compared to the others")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    from smollm2 import write_decoded_model, write_store

    files = (arguments.train_file, arguments.validation_file or arguments.train_file)
    names = list(dict.fromkeys(arguments.sides or default_sides()))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        store, decoded = Path(scratch) / "store", Path(scratch) / "decoded"
        write_store(store)
        write_decoded_model(store, decoded)
        sides = {
            name: partial(run_ours, store, PLACES[name], files, arguments.steps)
            if name in PLACES
            else partial(run_peer, decoded, name, files, arguments.steps)
            for name in names
        }
        results = take_turns(sides, arguments.rounds, arguments.beside, check_same)

    summary = summarize(results)
    record = {
        "summary": summary,
        "ratios": compare(summary, names, arguments.beside),
        "settings": SETTINGS | {name: getattr(arguments, name) for name in ("steps", "rounds", "beside")},
        "environment": environment()
        | processor_facts()
        | {"bitsandbytes": bitsandbytes_path.path(), "commit": commit()},
        "raw": results,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in summary.items():
        print(f"{name}: {in_words(row['seconds_per_step'])} s a step, peak {row['peak_rss_mib_max']:.0f} MiB")
    for kind, found in record["ratios"].items():
        for name, row in found.items():
            print(f"{kind}, {names[0] + ' to ' if kind == 'speed' else ''}{name}: {in_words(row)}")


if __name__ == "__main__":
    main()
