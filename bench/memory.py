"""Measures how much memory training takes, all told: nothing is subtracted.

    python bench/make_store.py --shape qwen2.5-3b --output stores/qwen2.5-3b
    python bench/memory.py steps --stores stores/qwen2.5-3b --limits 1GiB --text valid.txt --output FILE
    python bench/memory.py lengths --text valid.txt --output FILE      # beside transformers + PEFT + bitsandbytes
    python bench/memory.py budgets --text valid.txt --output FILE
    python bench/memory.py paging --text valid.txt --output FILE       # weights in files against weights resident
    python bench/memory.py batches --text valid.txt --output FILE      # micro-batches joined, one by one, and one alone
    python bench/memory.py leak --text valid.txt --output FILE         # 200 steps
    python bench/memory.py mezo --text valid.txt --output FILE         # against forward passes alone

Every run is `mebp train` in a process of its own. Its peak is the kernel's figure (VmHWM); the highest anonymous and
file-backed parts are sampled every 20 ms and need not have been reached at the same moment. `steps` runs again in a
control group of the budget's size, page cache included, and must give the same losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limits import Watched, watched
from machine import commit
from smollm2 import write_decoded_model, write_store

from mebp_triton.system import strict_json
from mebp_triton.system.machine import environment
from mebp_triton.system.units import MIB, parse_size

IMPORTS = "import torch, transformers; import transformers.models.qwen2.modeling_qwen2"
LORA = {"lora_r": 8, "lora_alpha": 16, "seed": 0}


def train(store: Path, text: Path, limit: int | None = None, **settings: Any) -> dict[str, Any]:
    """Runs `mebp train` once; returns its settings, plan, losses, times and peaks."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        flags = [flag(name.replace("_", "-"), value) for name, value in (LORA | settings).items()]
        command = [sys.executable, "-m", "mebp_triton.cli", "train", str(store), "--train-file", str(text)]
        done = watched([*command, "--output-dir", str(run), *flags, "--json"], limit)
        if done.returncode:
            return {"store": store.name, "settings": settings, "limit_bytes": limit, **ended(done)}
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((run / "run.json").read_text())
    timed = steps[1:] or steps  # without the first, which warms up
    seconds = statistics.median(step["seconds"] for step in timed)
    waited = statistics.median(step["seconds_waiting_for_data"] for step in timed)
    chosen = ("weights", "checkpoints", "optimizer_state", "recompute_granularity", "mlp_chunk_tokens")
    chosen += ("return_freed_memory",)
    return {
        "store": store.name,
        "settings": settings,
        "limit_bytes": limit,
        "chosen": {name: record["settings"][name] for name in chosen},
        "planned_peak_bytes": record["planned_peak_bytes"],
        "losses": [step["loss"] for step in steps],
        "step_seconds": [step["seconds"] for step in steps],
        "step_peak_rss_bytes": [step["peak_rss_bytes"] for step in steps],
        "step_paged_bytes": [step["bytes_paged"] for step in steps],
        "seconds_per_step": seconds,
        "seconds_waiting_for_data": waited,
        "tokens_per_second": steps[0]["tokens"] / seconds,
        **ended(done),
    }


def flag(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def ended(done: Watched) -> dict[str, Any]:
    return {
        "returncode": done.returncode,
        "error": done.stderr[-500:] if done.returncode else None,
        "peak_rss_bytes": done.peak,
        "peak_anonymous_bytes": done.anonymous,
        "peak_file_backed_bytes": done.file_backed,
    }


def show(row: dict[str, Any]) -> None:
    numbers = {
        name.removesuffix("_bytes"): f"{row[name] / MIB:.0f} MiB"
        for name in row
        if name.endswith("_bytes") and isinstance(row[name], int)
    }
    times = {name: f"{row[name]:.3g}" for name in ("seconds_per_step", "seconds_waiting_for_data") if name in row}
    print(
        row.get("side", ""), row["store"], row.get("settings", {}), numbers, times, row.get("error") or "", flush=True
    )


def steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole steps of every store: with its limit as a budget, and again with a hard limit as well."""
    if not arguments.stores or len(arguments.stores) != len(arguments.limits):
        raise SystemExit(
            f"steps needs --stores and a limit for each, got {len(arguments.stores)} and {arguments.limits}"
        )
    rows = [imports()]
    limits = [parse_size("limits", limit) for limit in arguments.limits]
    for store, limit in zip(arguments.stores, limits, strict=True):
        settings = {"max_steps": arguments.steps, "max_length": arguments.length, "memory_budget": limit}
        free = train(store, arguments.text, **settings)
        show(free)
        hard = train(store, arguments.text, limit, **settings)
        show(hard)
        if free["returncode"] or hard["returncode"]:
            raise SystemExit(f"{store}: a run failed: {free['error'] or hard['error']}")
        if free["losses"] != hard["losses"]:
            raise SystemExit(f"{store}: other losses under the limit: {free['losses']}, {hard['losses']}")
        if free["peak_rss_bytes"] > limit:
            raise SystemExit(f"{store}: a peak of {free['peak_rss_bytes']} bytes, and the limit is {limit}")
        rows += [free, hard]
    return rows


def imports() -> dict[str, Any]:
    """The memory that importing the libraries alone takes."""
    row = {"store": "", "side": f"python -c '{IMPORTS}'", **ended(watched([sys.executable, "-c", IMPORTS]))}
    show(row)
    return row


def lengths(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """SmolLM2 at several lengths: ours by default, ours in the least memory, and the peer."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store, decoded = write_store(Path(scratch) / "smollm2"), Path(scratch) / "decoded"
        write_decoded_model(store, decoded)
        for length in arguments.lengths:
            settings = {"max_steps": arguments.steps, "max_length": length}
            small = {"recompute_granularity": "full", "mlp_chunk_tokens": 128}
            sides = [("mebp", train(store, arguments.text, **settings))]
            sides.append(("mebp, least memory", train(store, arguments.text, **settings, **small)))
            sides.append(("peft nf4", train_peer(decoded, arguments.text, settings)))
            for side, row in sides:
                rows.append({"side": side} | row)
                show(rows[-1])
    return rows


def train_peer(model: Path, text: Path, settings: dict[str, Any]) -> dict[str, Any]:
    given = {"model": str(model), "tokenizer": str(model), "base": "nf4-float32", "train_file": str(text)}
    given |= LORA | {"learning_rate": 2e-4, "warmup_steps": 0} | settings
    done = watched([sys.executable, "-m", "mebp_triton.cli.peft_baseline", json.dumps(given)])
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    row = {"store": "smollm2", "settings": settings, "losses": found.get("train_losses"), **ended(done)}
    if found:
        row["step_seconds"] = found["step_seconds"]
        row["seconds_per_step"] = statistics.median(found["step_seconds"][1:])
    return row


def train_on_each(arguments: argparse.Namespace, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains on every store of the command line, or on SmolLM2, once with each of the settings."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for store in arguments.stores or [write_store(Path(scratch) / "smollm2")]:
            for one in settings:
                rows.append(train(store, arguments.text, max_steps=arguments.steps, max_length=arguments.length, **one))
                show(rows[-1])
    return rows


def budgets(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every budget: the settings chosen for it, their speed and their peak."""
    return train_on_each(arguments, [{"memory_budget": budget} for budget in arguments.budgets])


def paging(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Weights resident against weights in files, in turns; nothing else differs."""
    places = [{"checkpoints": "file", "weights": place} for place in ("device", "file")]
    rows = train_on_each(arguments, places * arguments.rounds)
    seconds: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        seconds.setdefault((row["store"], row["settings"]["weights"]), []).extend(row["step_seconds"][1:])
    for (store, place), values in seconds.items():
        print(store, place, f"{statistics.median(values):.3f} s/step")
    return rows


def batches(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of one micro-batch, and of eight: joined, so that they go through each block together, or one by one.

    Joined, they page as many bytes as one alone, and the peak is that of one, within 10 %, beside their block inputs.
    """
    common = {"weights": "file", "checkpoints": "file", "recompute_granularity": "full", "return_freed_memory": True}
    eight = common | {"gradient_accumulation_steps": 8}
    settings = [common, eight | {"join_micro_batches": True}, eight | {"join_micro_batches": False}]
    rows = train_on_each(arguments, settings)
    if any(row["returncode"] for row in rows):
        raise SystemExit("a run failed")
    for one, joined, single in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        for name, row in (("one", one), ("eight, joined", joined), ("eight, one by one", single)):
            paged, peak = row["step_paged_bytes"][-1] / MIB, row["peak_rss_bytes"] / MIB
            print(f"{name}: {paged:.0f} MiB paged, peak {peak:.0f} MiB, {row['seconds_per_step']:.2f} s/step")
        if joined["step_paged_bytes"] != one["step_paged_bytes"]:
            raise SystemExit("eight micro-batches that are joined paged other bytes than one")
        # Their block inputs lie in files, so what is left to add is 10 %.
        if joined["peak_rss_bytes"] > 1.1 * one["peak_rss_bytes"]:
            raise SystemExit("the peak of eight micro-batches that are joined is more than 10 % above that of one")
    return rows


def leak(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Many steps: the peak must not grow after the first ones."""
    with tempfile.TemporaryDirectory() as scratch:
        row = train(write_store(Path(scratch) / "smollm2"), arguments.text, max_steps=200, max_length=16)
    show(row)
    peaks = row["step_peak_rss_bytes"]
    print(f"peak after 20 steps {peaks[19] / MIB:.1f} MiB, after 200 {peaks[-1] / MIB:.1f} MiB")
    if peaks[-1] > peaks[19] + 8 * MIB:
        raise SystemExit("the peak grew")
    return [row]


def mezo(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """MeZO's steps beside forward passes alone (`mebp eval` with the adapter that the steps gave)."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store, run = write_store(Path(scratch) / "smollm2"), Path(scratch) / "run"
        shared = [f"--max-length={arguments.length}", "--device=cpu", "--json"]
        sides = {
            "mezo": ["train", "--train-file", arguments.text, "--output-dir", run, "--optim=mezo", "--max-steps=6"],
            "forward": ["eval", "--adapter", run / "adapter", "--validation-file", arguments.text]
            + ["--max-eval-windows=12"],
        }
        for side, (command, *flags) in sides.items():
            done = watched([sys.executable, "-m", "mebp_triton.cli", command, str(store), *map(str, flags), *shared])
            rows.append({"store": store.name, "side": side, **ended(done)})
            show(rows[-1])
    if any(row["returncode"] for row in rows):
        raise SystemExit("a run failed")
    print(f"mezo / forward: {rows[0]['peak_rss_bytes'] / rows[1]['peak_rss_bytes']:.3f}")
    return rows


PARTS = {
    "steps": steps,
    "lengths": lengths,
    "budgets": budgets,
    "paging": paging,
    "batches": batches,
    "leak": leak,
    "mezo": mezo,
}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--stores", type=Path, nargs="*", default=[], help="stores made by bench/make_store.py")
    parser.add_argument("--limits", nargs="*", default=[], help="of `steps`: one for every store, such as 1GiB")
    parser.add_argument("--budgets", nargs="*", default=["600MiB", "700MiB", "1GiB", "2GiB"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--length", type=int, default=256, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(given)
    rows = PARTS[arguments.part](arguments)
    record = {"part": arguments.part, "commit": commit(), "environment": environment(), "rows": rows}
    strict_json.write_json(arguments.output, record)


if __name__ == "__main__":
    main()
