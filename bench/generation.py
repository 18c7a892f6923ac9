"""Times `mebp generate` beside transformers in float32 and llama.cpp on the same 4-bit weights, in turns.

    python bench/generation.py --output bench/results/NAME.json          # needs xllamacpp for the side llama.cpp

SmolLM2-135M, the likeliest token each time, a process for each run. transformers has the weights that our store decodes
to, in float32; llama.cpp reads the GGUF file that the store was made of. `first_seconds` is from the command's start to
the first text on its standard output, `tokens_per_second` counts the tokens after the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from machine import commit, processor_facts
from turns import in_words, ratios, spread, take_turns

from mebp_triton.system.machine import environment

PEER = Path(__file__).with_name("generation_peer.py")
PROMPT = "The history of the city begins"
SPEED = re.compile(r"(\d+) tokens: .* then ([\d.]+) tokens/s")


def timed(command: list[str]) -> tuple[float, str, str]:
    """Runs Python with these arguments.

    Returns:
        Seconds until the first byte on standard output, all of it, and standard error.

    Raises:
        RuntimeError: it failed, or wrote nothing.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        text = first + process.stdout.read()
        process.stdout.close()
        process.wait()
        errors.seek(0)
        said = errors.read().decode()
    if process.returncode or not first:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    return seconds, text.decode(), said


def run_ours(store: Path, tokens: int) -> dict[str, Any]:
    command = ["-m", "mebp_triton.cli", "generate", str(store), "--prompt", PROMPT, "--max-new-tokens", str(tokens)]
    first, text, said = timed(command)
    found = SPEED.search(said)
    if found is None or int(found[1]) != tokens:
        raise RuntimeError(f"not {tokens} tokens: {said}")
    return {"first_seconds": first, "tokens_per_second": float(found[2]), "text": text.strip()}


def run_peer(side: str, model: Path, tokens: int) -> dict[str, Any]:
    threads = environment()["threads"]  # torch's default, for llama.cpp too
    first, text, _ = timed([str(PEER), side, str(model), PROMPT, str(tokens), str(threads)])
    found = json.loads(text)
    # llama.cpp answers at the end, and says how long it took after the first token.
    return found | {"first_seconds": first - found.pop("later_seconds")}


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each side tokens per second and seconds to the first token, and how it compares to ours."""
    table: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        ours = results[name.replace(name.split(" beside")[0], "mebp", 1)]
        speeds = {side: [one["tokens_per_second"] for one in found] for side, found in (("ours", ours), ("its", runs))}
        table[name] = {
            "tokens_per_second": spread(speeds["its"]),
            "first_seconds": spread(one["first_seconds"] for one in runs),
            "our_speed_to_its": ratios(speeds["ours"], speeds["its"]),
            "same_text": [one["text"] == other["text"] for one, other in zip(ours, runs, strict=True)],
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of every run")
    parser.add_argument("--rounds", type=int, default=5, help="how often the sides take turns")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="busy loops beside a second run")
    arguments = parser.parse_args()
    if arguments.tokens < 3 or arguments.rounds < 1:
        parser.error("at least 3 tokens and one round are needed")
    from smollm2 import find_model, write_decoded_model, write_store

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        store, decoded = Path(scratch) / "store", Path(scratch) / "decoded"
        write_store(store)
        write_decoded_model(store, decoded)
        sides = {
            "mebp": partial(run_ours, store, arguments.tokens),
            "transformers float32": partial(run_peer, "transformers", decoded, arguments.tokens),
        }
        if importlib.util.find_spec("xllamacpp") is not None:
            sides["llama.cpp"] = partial(run_peer, "llama.cpp", find_model(), arguments.tokens)
        results = take_turns(sides, arguments.rounds, arguments.beside)
    record = {
        "summary": summarize(results),
        "settings": {name: getattr(arguments, name) for name in ("tokens", "rounds", "beside")} | {"prompt": PROMPT},
        "environment": environment() | processor_facts() | {"commit": commit()},
        "raw": results,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["summary"].items():
        print(
            f"{name}: {in_words(row['tokens_per_second'])} tokens/s, first after {in_words(row['first_seconds'])} s; "
            f"ours {in_words(row['our_speed_to_its'])} times as fast"
        )


if __name__ == "__main__":
    main()
